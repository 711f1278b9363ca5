"""The report of a run: figures are those of the files, whatever a text holds is text, and what is missing is said."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from evaluation.report import build_report, main
from evaluation.report_parts import MediaBudget, MissingError, code_block, plain, report_html
from tests.finished_run import HOSTILE, LOSSES, picture, write_finished_run

SECTIONS = [
    *("Training", "Configuration", "Model", "Data", "Losses", "Depth", "Controls", "Efficiency", "Generated media"),
    *("Dynamics", "Samples", "Answers", "Speed", "Environment"),
]


class Page(HTMLParser):
    """The rows of the tables below each heading, the names of all tags, their attributes, and all text."""

    def __init__(self, text: str):
        super().__init__()
        self.heading, self.rows, self.tags, self.attributes, self.texts = "", {}, set(), [], []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        self.inside = tag
        if tag == "h2":
            self.heading = ""
        elif tag == "tr":
            self.rows.setdefault(self.heading, []).append([])
        elif tag in ("td", "th"):
            self.rows[self.heading][-1].append("")

    def handle_data(self, data):
        self.texts.append(data)
        if self.inside == "h2":
            self.heading += data.strip()
        elif self.inside in ("td", "th", "code"):
            self.rows[self.heading][-1][-1] += data.strip()

    def addresses(self) -> list[str]:
        """What the page loads."""
        return [value for name, value in self.attributes if name == "src"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_finished_run(tmp_path_factory.mktemp("runs") / "mine")


@pytest.fixture(scope="module")
def page(run):
    assert main([str(run)]) == 0
    return Page((run / "report.html").read_text())


@pytest.fixture
def copied(run, tmp_path):
    """A run that a test may damage."""
    return shutil.copytree(run, tmp_path / "mine", ignore=shutil.ignore_patterns("report.*"))


def skipped_of(run) -> dict[str, tuple[str, str]]:
    return {it.what: (it.reason, it.command) for it in build_report(run).skipped}


def test_figures_are_those_of_the_files(page):
    assert list(page.rows) == [name for name in SECTIONS if name not in ("Configuration", "Samples")]
    rows = {name: [tuple(row) for row in found] for name, found in page.rows.items()}
    assert ("steps", "30 of 30") in rows["Training"] and ("loss", "1.5000") in rows["Training"]
    assert rows["Model"][1:3] == [("core", "110,976"), ("all", "703,440")]
    assert ("1", "1.235e+05") in rows["Model"]  # the fixed depth of efficiency.json, and not the exits
    assert (
        "drawings",
        "train",
        "kind generated, task drawings, num_rows 777, weight 2.0, direction text -> image",
    ) in rows["Data"]
    assert ("sums", "1", "17", "1") in rows["Data"]
    assert rows["Losses"][0] == ("step", *map(str, LOSSES)) and rows["Losses"][1] == (
        "loss",
        "4.1250",
        "2.0625",
        "1.5000",
    )
    assert rows["Losses"][3] == ("loss", "1.7500")
    first, second = rows["Depth"][1:3]
    assert first[:2] == ("1", "1.2346 (0.9846 to 1.4846)") and second[1] == "0.9877 (0.7377 to 1.2377)"
    assert first[-2:] == ("50.0 % (10.0 to 90.0)", "0.0125") and second[-1] == "0.0250"
    assert ("1", "25.0 %", "12.5 %") in rows["Depth"]
    assert rows["Controls"][1][:2] == ("1", "1.5000 (1.2500 to 1.7500)")
    assert ("1", "0.4375 (0.3750 to 0.5000)", *["37.5 % (25.0 to 50.0)"] * 4) in rows["Controls"]
    exits = (
        "kl_divergence 0.0005",
        "2.346e+05",
        "0.7500",
        "1.50",
        "1.4375 (1.0000 to 2.0000)",
        "62.5 % (25.0 to 75.0)",
        "-",
    )
    assert exits in rows["Efficiency"]
    assert ("fixed depth", "loss", "-0.3125 (-0.5000 to -0.1250)") in rows["Efficiency"]
    assert ("2", "43.8 %", "56.2 %", "12.5") in rows["Generated media"]
    assert ("kl_divergence", "0.0005", "2.50") in rows["Dynamics"]
    assert ("tokens_per_second", "20,000.0", "30,000.0") in rows["Speed"] and ("2", "0.0250") in rows["Speed"]
    assert rows["Environment"][1:] == [("python", "3.11.7"), ("torch", "2.11.0")]
    assert "settles: each step is 0.812 times as long as the last" in "".join(page.texts)


def test_whatever_a_text_holds_is_shown_as_text(page, run):
    """In samples, answers, prompts and names; as HTML nothing of it is a tag, and nothing is loaded from elsewhere."""
    text = "".join(page.texts)
    assert text.count(HOSTILE) == 3 and "<b>mine</b>" in text
    assert "script" not in page.tags and "b" not in page.tags
    assert ["42", f"{HOSTILE} ✗", "42 ✓"] in page.rows["Answers"]
    assert all(address.startswith("data:") for address in page.addresses()) and len(page.addresses()) == 11
    assert not [value for name, value in page.attributes if name == "href" and not value.startswith("#")]
    # In Markdown: code blocks apart, no tag, no link, and no cell that ends early.
    lines = re.sub(r"(?ms)^```.*?^```$", "", (run / "report.md").read_text())
    assert "<script>" not in lines and not re.search(r"(?<!\\)\[a\]|(?<!\\)\]\(http", lines)
    answers = lines.split("## Answers")[1].split("##")[0]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in answers.splitlines() if line.startswith("|")} == {4}


def test_markdown_names_the_pictures_that_are_files(run, page):
    text = (run / "report.md").read_text()
    assert "![what depth buys](<evaluation/depth.png>)" in text
    assert "losses by optimizer step: in the page beside this file." in text


def test_a_whole_run_skips_nothing(run, capsys):
    assert main([str(run), "--output", str(run / "again.html")]) == 0
    assert capsys.readouterr().out == f"written to {run / 'again.html'}, {run / 'again.md'}\n"
    assert (run / "again.html").stat().st_size < 200_000


def test_what_is_not_there_is_listed_with_the_command_that_makes_it(copied, capsys):
    for name in ("evaluation", "dynamics", "runs"):
        shutil.rmtree(copied / name)
    for name in ("trainer_state.json", "README.md"):
        (copied / name).unlink()
    assert main([str(copied)]) == 0
    told = capsys.readouterr().out.splitlines()
    depth = f"python -m evaluation {copied} --num-steps 1 2 4 8"
    assert f"skipped Depth: evaluation/depth.json is not there ({depth})" in told
    assert f"skipped Controls: evaluation/controls.json is not there ({depth} --controls)" in told
    found = skipped_of(copied)
    assert found["Efficiency"] == ("evaluation/efficiency.json is not there", f"{depth} --efficiency")
    assert found["Dynamics"][1] == f'python -m evaluation.dynamics {copied} --prompt "Once"'
    assert found["Losses"][1] == "python pretrain.py --config FILE --training.report_to tensorboard"
    assert set(found) == {*SECTIONS, "versions of the training"} - {"Configuration", "Data", "Environment"}
    page = Page((copied / "report.html").read_text())
    assert ["Depth", "evaluation/depth.json is not there", depth] in page.rows["Skipped"]


DAMAGES = {
    "depth.json": ('{"rows": [{"num_steps": 1, "loss": "low"}]}', "Depth", "0.loss: Input should be a valid number"),
    "controls.json": ('{"tables": [', "Controls", "JSONDecodeError"),
    "efficiency.json": ("[]", "Efficiency", "0: Input should be a dictionary"),
    "media.json": ('{"rows": []}', "Generated media", "KeyError: 'real'"),
    "depth_examples.jsonl": ('{"num_steps": 1}', "Answers", "KeyError: 'source'"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_named_with_its_fault(copied, name):
    content, section, fault = DAMAGES[name]
    (copied / "evaluation" / name).write_text(content)
    reason, command = skipped_of(copied)[section]
    assert reason.startswith(f"evaluation/{name} is damaged (") and fault in reason
    assert command.startswith(f"python -m evaluation {copied}")


def test_rows_that_do_not_fit_each_other_are_damaged(copied):
    content = json.loads((copied / "evaluation/depth.json").read_text())
    content["rows"][1]["exact_match"] = {}
    (copied / "evaluation/depth.json").write_text(json.dumps(content))
    assert skipped_of(copied)["Depth"][0] == "evaluation/depth.json is damaged (KeyError: 'sums')"


def test_pictures_logs_and_configurations_may_be_damaged(copied):
    (copied / "evaluation/depth.png").unlink()
    (copied / "evaluation/controls.png").write_bytes(picture()[:40])
    (copied / "dynamics/item_4.wav").write_text("no sound")
    (copied / "config.yaml").write_text("data: 3")
    for path in copied.rglob("events.out.tfevents.*"):
        path.write_bytes(b"x" * 500)
    found = skipped_of(copied)
    assert found["picture evaluation/depth.png"][0] == "evaluation/depth.png is not there"
    assert "it is no whole picture" in found["picture evaluation/controls.png"][0]
    assert found["sound item_4.wav"][0] == "it is no WAV file"
    assert found["Data"][0].startswith("a file of it is damaged (AttributeError")
    assert "not one event can be read" in found["a log of training"][0]


def test_large_media_are_made_smaller_and_too_many_are_left_out():
    budget = MediaBudget(most_bytes=2000)
    assert budget.picture(picture(), "small").address.startswith("data:image/png;base64,")
    with pytest.raises(MissingError, match="it is no WAV file"):
        budget.sound(b"RIFFxxxxAVI ", "no sound")
    with pytest.raises(MissingError, match="a report has room for"):
        budget.sound(b"RIFF\0\0\0\0WAVE" + bytes(2000), "long")


def test_text_is_text_in_markdown():
    assert plain("a|b\n<i> [c](d) `e` *f*") == r"a\|b &lt;i&gt; \[c\](d) \`e\` \*f\*"
    assert code_block("```\n````") == "`````\n```\n````\n`````"


def test_a_page_without_anything_skipped_has_no_list(run):
    report = build_report(run)
    assert report.skipped == [] and "Skipped" not in report_html(report)


def check_error(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in argv])
    found = capsys.readouterr()
    assert stop.value.code == 2 and found.out == ""
    assert found.err == f"evaluation.report: error: {message}\n"


def test_errors_are_one_line_and_leave_nothing(copied, tmp_path, capsys):
    check_error(capsys, [tmp_path / "no"], f"{tmp_path / 'no'} does not exist: give the folder of a run.")
    file = copied / "config.yaml"
    check_error(capsys, [file], f"{file} is a file: give the folder of a run.")
    (tmp_path / "empty").mkdir()
    nothing = "holds nothing of a run (no config.yaml, weights or evaluation): give a run's folder."
    check_error(capsys, [tmp_path / "empty"], f"{tmp_path / 'empty'} {nothing}")
    check_error(capsys, [copied, "--output", "a.pdf"], "--output a.pdf is no name for a page: end it in .html.")
    output = tmp_path / "far" / "a.html"
    check_error(
        capsys, [copied, "--output", output], f"--output {output}: the folder {output.parent} does not exist; make it."
    )
    (copied / "report.md").mkdir()
    check_error(capsys, [copied], f"{copied / 'report.md'} cannot be written: {copied / 'report.md'} is a folder")
    assert not (copied / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_in_a_browser(run, page, width):
    """Nothing is complained about, all pictures are shown, and tables scroll within themselves."""
    from playwright.sync_api import sync_playwright

    said = []
    with sync_playwright() as playwright:
        options = {"executable_path": shutil.which("chromium"), "args": ["--no-sandbox", "--disable-dev-shm-usage"]}
        browser = playwright.chromium.launch(**options)
        shown = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark")
        shown.on("console", lambda message: said.append(message.text))
        shown.on("pageerror", lambda error: said.append(str(error)))
        shown.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
        shown.goto((run / "report.html").as_uri())
        sizes = shown.evaluate("[...document.images].map((image) => image.complete && image.naturalWidth)")
        overflow = shown.evaluate("document.documentElement.scrollWidth - innerWidth")
        tables = shown.evaluate(
            "[...document.querySelectorAll('.scroll')].filter((it) => it.scrollWidth > it.clientWidth).length"
        )
        ground = shown.evaluate("getComputedStyle(document.body).backgroundColor")
        players = shown.evaluate("[...document.querySelectorAll('audio')].map((it) => it.duration > 0)")
        browser.close()
    assert said == [] and len(sizes) == 9 and all(sizes)
    assert overflow <= 0 and (tables > 3) == (width == 400)
    assert players == [True, True] and ground == "rgb(20, 23, 27)"
