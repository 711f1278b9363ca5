"""The page of the server in a browser: what it shows is what the server says, for everybody and on every screen."""

import base64
import io
import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import soundfile

from dataset_loading import DataConfig, SourceConfig, build_datasets
from dataset_loading.sources.messages import media_of, parse_messages, text_of
from inference.loading import load_model
from tests.serving import server
from tests.tiny_artist import save_artist
from tests.tiny_language_model import save_checkpoint
from tests.tiny_processor import audio_file, image_file, picture, sound
from tests.tiny_talker import save_talker

pytestmark = pytest.mark.slow

KEY = "first-key"
QUESTION = "What is 2*21?"
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
PICTURE, SOUND = image_file(picture()), audio_file(sound())
MARKUP = "<img src=x onerror=alert(1)> <b>bold</b> & <script>alert(2)</script>"
# What a browser says of each response that is an error, and of a server that is gone.
NETWORK = re.compile("Failed to load resource")
ENVIRONMENT = """
    for (const name of ["securitypolicyviolation", "unhandledrejection"])
        addEventListener(name, (event) => console.error(name, event.violatedDirective ?? String(event.reason)));
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, save in (("talker", save_talker), ("artist", save_artist), ("plain", save_checkpoint)):
        (folder / name).mkdir()
        save(folder / name)
    return folder


@pytest.fixture(scope="module")
def client(runs, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"{KEY}\n")
    limits = ("--max-new-tokens", 200, "--max-prompt-tokens", 190, "--max-steps", 8, "--max-media", 2)
    names = [runs / name for name in ("talker", "artist", "plain")]
    with server(*names, *limits, "--api-key-file", keys) as client:
        yield client


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=30_000)
    fakes = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # a microphone that beeps
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-dev-shm-usage", *fakes]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(client, chromium):
    """Opens the page; a test in which the browser has complained fails."""
    contexts, complaints = [], []

    def note(message):
        if message.type in ("error", "warning") and not NETWORK.match(message.text):
            complaints.append(message.text)

    def open_page(key=KEY, width=1280, height=800, **options):
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.add_init_script(ENVIRONMENT)
        if key:
            context.add_init_script(f"sessionStorage.getItem('key') ?? sessionStorage.setItem('key', '{key}')")
        page = context.new_page()
        page.on("console", note)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message) or dialog.dismiss())
        page.goto(f"http://127.0.0.1:{client.port}/")
        if key:
            expect_text(page.locator("#facts"), "talker")
            page.locator("#temperature").evaluate("(it) => (it.value = 0)")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


@pytest.fixture
def page(open_page):
    return open_page()


def expect_text(locator, text):
    from playwright.sync_api import expect

    expect(locator).to_contain_text(text)


def expect_count(locator, count):
    from playwright.sync_api import expect

    expect(locator).to_have_count(count)


def expect_visible(locator, is_visible=True):
    from playwright.sync_api import expect

    expect(locator).to_be_visible(visible=is_visible)


def expect_focused(locator):
    from playwright.sync_api import expect

    expect(locator).to_be_focused()


def ask(page, text=QUESTION, path=CHAT):
    """Sends a message, waits until it is answered, and gives what the browser has sent."""
    page.locator("#prompt").fill(text)
    with page.expect_request(f"**{path}") as sent:
        page.locator("#prompt").press("Enter")
    expect_visible(page.locator("#send"))
    return sent.value.post_data_json


def answer(client, body, path=CHAT):
    """What the server answers to the same, as a whole."""
    body = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
    status, content = client.send(path, body, {"authorization": f"Bearer {KEY}"})
    assert status == 200, content
    return json.loads(content)


def choose_steps(page, steps):
    page.locator("#steps").fill(str(steps))


def steps_of(tokens):
    return [int(steps) for steps in tokens.evaluate_all("them => them.map((it) => it.dataset.steps)")]


def colours_of(elements):
    return elements.evaluate_all("them => them.map((it) => getComputedStyle(it).backgroundColor)")


def event_stream(*parts):
    """A stream of choices, each with a delta."""
    choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, **more} for delta, more in parts]
    return "".join(f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in choices)


def fake(page, body):
    """Answers chats with a body instead of the server."""
    page.route(f"**{CHAT}", lambda route: route.fulfill(body=body, content_type="text/event-stream"))


# ---------------------------------------------------------------------------------------------------------------- texts


def test_each_token_has_the_colour_of_its_steps(page, client):
    """Tokens, steps, sums and text are those that the server gives as a whole; the legend has the same colours."""
    choose_steps(page, 8)
    page.locator("#criterion").select_option("kl_divergence")
    page.locator("#threshold").fill("0.05")
    body = ask(page)
    assert body["num_steps"] == 8 and body["exit_threshold"] == 0.05 and body["stream"] and "seed" not in body
    whole = answer(client, body)
    (choice,) = whole["choices"]
    tokens, swatches = page.locator(".token"), page.locator("#legend .swatch")
    assert tokens.all_text_contents() == choice["tokens"] and choice["message"]["content"] == "calculator(2*21)"
    assert steps_of(tokens) == choice["exit_steps"] and len(set(choice["exit_steps"])) > 2
    scale = dict(zip(map(int, swatches.all_text_contents()), colours_of(swatches), strict=True))
    assert list(scale) == [1, 2, 3, 4, 5, 6, 7, 8] and len(set(scale.values())) == 8
    assert colours_of(tokens) == [scale[steps] for steps in choice["exit_steps"]]
    total, count = sum(choice["exit_steps"]), len(choice["tokens"])
    expect_text(page.locator(".summary"), f"{count} tokens · {total} core steps · mean {total / count:.1f}")
    tokens.nth(2).hover()
    expect_text(page.locator("#tip"), f"{choice['exit_steps'][2]} steps {choice['tokens'][2]}")
    page.locator("#numbers").check()
    shown = tokens.first.evaluate("(it) => getComputedStyle(it, '::after').content")
    assert shown == "attr(data-steps)" or shown == f'"{choice["exit_steps"][0]}"'
    assert page.locator(".tokens").inner_text() == "calculator(2*21)"  # what is selected and copied


def test_the_legend_of_many_steps_has_powers_of_two(page):
    found = page.evaluate("showScale(24), [...document.querySelectorAll('.swatch')].map((it) => it.textContent)")
    assert found == ["1", "2", "4", "8", "16", "24"]


def test_a_conversation_is_regenerated_edited_copied_and_cleared(page):
    page.locator("#system").fill("Be brief.")
    page.locator("#seed").fill("7")
    first = ask(page)
    system = {"role": "system", "content": "Be brief."}
    assert first["messages"] == [system, {"role": "user", "content": QUESTION}] and first["seed"] == 7
    said = page.locator(".assistant .tokens").inner_text()
    second = ask(page, "A tower!")
    assert second["messages"][2:] == [{"role": "assistant", "content": said}, {"role": "user", "content": "A tower!"}]
    with page.expect_request(f"**{CHAT}") as sent:
        page.locator(".assistant").nth(1).get_by_role("button", name="Regenerate").click()
    assert sent.value.post_data_json == second
    expect_visible(page.locator("#send"))
    expect_count(page.locator(".message"), 4)
    page.locator(".user").first.get_by_role("button", name="Edit").click()
    field = page.get_by_label("Edited message")
    field.fill("nothing")
    field.press("Escape")
    expect_text(page.locator(".user").first, QUESTION)
    page.locator(".user").first.get_by_role("button", name="Edit").click()
    field.fill("What is 2*22?")
    with page.expect_request(f"**{CHAT}") as sent:
        field.press("Enter")
    assert sent.value.post_data_json["messages"] == [system, {"role": "user", "content": "What is 2*22?"}]
    expect_visible(page.locator("#send"))
    expect_count(page.locator(".message"), 2)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(".user").get_by_role("button", name="Copy").click()
    expect_text(page.get_by_role("status"), "Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == "What is 2*22?"
    page.get_by_role("button", name="Clear").click()
    expect_count(page.locator(".message"), 0)
    assert len(ask(page)["messages"]) == 2


def test_a_reply_is_stopped(page, client):
    """What has come stays, and the place in the server is free."""
    choose_steps(page, 8)
    page.locator("#temperature").fill("50")
    page.locator("#max-tokens").fill("200")
    page.evaluate("""() => new MutationObserver((changes, observer) => {
        if (!document.querySelector(".token")) return;
        observer.disconnect();
        document.getElementById("prompt").dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
    }).observe(document.getElementById("log"), { childList: true, subtree: true })""")
    page.locator("#prompt").fill(QUESTION)
    page.locator("#prompt").press("Enter")
    expect_text(page.locator(".summary"), "stopped")
    assert 0 < page.locator(".token").count() < 200
    expect_focused(page.locator("#prompt"))
    while b"\nmegatransformer_jobs 0.0" not in client.send("/metrics", None, {"authorization": f"Bearer {KEY}"})[1]:
        pass
    page.route(f"**{CHAT}", lambda route: None)  # a server that says nothing
    page.get_by_role("button", name="Regenerate").click()
    expect_focused(page.locator("#stop"))
    page.keyboard.press("Enter")
    expect_text(page.locator(".summary"), "stopped")


def test_a_text_goes_on(page, client):
    """A model without conversations gets all that stands there, and may be asked for more without new text."""
    page.locator("#model").select_option("plain")
    expect_text(page.locator("#facts"), "your text goes on")
    page.locator("#max-tokens").fill("5")
    body = ask(page, "the cat", COMPLETE)
    assert body["prompt"] == "the cat"
    (choice,) = answer(client, body, COMPLETE)["choices"]
    tokens = page.locator(".token")
    assert tokens.all_text_contents() == choice["tokens"] and steps_of(tokens) == choice["exit_steps"]
    assert ask(page, "", COMPLETE)["prompt"] == "the cat" + choice["text"]
    with page.expect_download() as saved:
        page.locator("#export").click()
    row = json.loads(saved.value.path().read_text())
    assert row["text"] == "the cat" + "".join(page.locator(".assistant .tokens").all_text_contents())


def test_depths_stand_side_by_side(page):
    """The same prompt and seed, at three depths at once."""
    requests = []
    page.on("request", lambda request: requests.append(request.post_data_json) if CHAT in request.url else None)
    page.get_by_text("Side by side", exact=True).first.click()
    columns = page.locator(".run")
    assert [column.get_by_label("Steps").input_value() for column in columns.all()] == ["1", "4", "8"]
    columns.nth(1).get_by_label("Steps").fill("3")
    ask(page)
    assert sorted(body["num_steps"] for body in requests) == [1, 3, 8]
    assert len({body["seed"] for body in requests}) == 1
    assert all(body["messages"] == [{"role": "user", "content": QUESTION}] for body in requests)
    for column, steps in zip(columns.all(), (1, 3, 8), strict=True):
        assert set(steps_of(column.locator(".token"))) == {steps}
    assert columns.nth(1).locator(".tokens").inner_text() == "calculator(2*21)"
    expect_visible(page.locator("#legend"))
    expect_text(page.locator("#compare-seed"), str(requests[0]["seed"]))
    columns.nth(0).get_by_label("Steps").fill("9")
    page.locator("#prompt").fill("again")
    page.locator("#prompt").press("Enter")
    assert len(requests) == 3 and page.locator("#prompt").input_value() == "again"


def test_text_that_looks_like_markup_is_text(page):
    fake(page, event_stream(({"content": MARKUP}, {"tokens": list(MARKUP), "exit_steps": [1] * len(MARKUP)})))
    page.locator("#system").fill(MARKUP)
    ask(page, MARKUP)
    assert page.locator(".said").inner_text() == MARKUP
    assert page.locator(".assistant .tokens").text_content() == MARKUP
    assert page.locator("#log img, #log b, #log script").count() == 0


def test_text_that_comes_later_than_its_tokens(page):
    """What may be the beginning of a stop string is held back, and one that was found is cut."""
    parts = [({"content": "a"}, {"tokens": ["a", "b", "", "cd"], "exit_steps": [1, 2, 3, 4]}), ({"content": "bc"}, {})]
    fake(page, event_stream(*parts) + "data: [DONE]\n\n")
    ask(page)
    assert page.locator(".token").all_text_contents() == ["a", "b", "", "c"]
    expect_text(page.locator(".summary"), "4 tokens · 10 core steps · mean 2.5")


# ---------------------------------------------------------------------------------------------------------------- media


def test_images_and_sounds_are_sent(page, client):
    """Files, what is pasted and what is dropped; previews can be removed; the model answers to all of it."""
    expect_visible(page.locator("#add-image"), False)
    page.locator("#model").select_option("artist")
    expect_visible(page.locator("#add-image"))
    page.locator("#image-file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": PICTURE})
    page.locator("#audio-file").set_input_files({"name": "a.wav", "mimeType": "audio/wav", "buffer": SOUND})
    expect_count(page.locator("#attachments li"), 2)
    expect_visible(page.locator("#attachments audio"))
    page.locator("#image-file").set_input_files({"name": "b.png", "mimeType": "image/png", "buffer": PICTURE})
    expect_text(page.locator("#problem"), "at most 2 images and sounds")
    page.get_by_role("button", name="Remove a.png").click()
    expect_count(page.locator("#attachments li"), 1)
    give = """([how, data]) => {
        const transfer = new DataTransfer();
        const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
        transfer.items.add(new File([bytes], `${how}.png`, { type: "image/png" }));
        const options = { bubbles: true, cancelable: true };
        const prompt = document.getElementById("prompt");
        if (how === "drop") prompt.dispatchEvent(new DragEvent("drop", { ...options, dataTransfer: transfer }));
        else prompt.dispatchEvent(new ClipboardEvent("paste", { ...options, clipboardData: transfer }));
    }"""
    for how in ("paste", "drop"):
        page.evaluate(give, [how, base64.b64encode(PICTURE).decode()])
        expect_count(page.locator("#attachments li"), 2)
        if how == "paste":
            page.get_by_role("button", name="Remove paste.png").click()
            expect_count(page.locator("#attachments li"), 1)
    page.locator("#max-tokens").fill("9")
    body = ask(page, "?")
    (message,) = body["messages"]
    audio, image, text = message["content"]
    assert audio == {"type": "input_audio", "input_audio": {"data": base64.b64encode(SOUND).decode(), "format": "wav"}}
    assert image == {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"},
    }
    assert text == {"type": "text", "text": "?"}
    expect_count(page.locator("#attachments li"), 0)
    expect_visible(page.locator(".user img"))
    (choice,) = answer(client, body)["choices"]
    assert page.locator(".token").all_text_contents() == choice["tokens"]


def test_a_recording_is_sent_as_wav(page):
    page.locator("#model").select_option("artist")
    page.get_by_role("button", name="Record").click()
    expect_text(page.get_by_role("button", name="Stop recording"), "0:01")
    page.get_by_role("button", name="Stop recording").click()
    expect_visible(page.locator("#attachments audio"))
    page.locator("#max-tokens").fill("2")
    (part,) = ask(page, "")["messages"][0]["content"]
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(part["input_audio"]["data"])))
    assert rate == 16000 and 0.5 < len(samples) / rate < 10 and abs(samples).max() > 0.01
    assert page.locator(".problem:visible").count() == 0


def test_images_are_drawn(page, client):
    """The image of a seed is that of the server's other route for images."""
    page.locator("#model").select_option("artist")
    page.locator("#kind").select_option("image")
    page.locator("#seed").fill("3")
    choose_steps(page, 2)
    page.locator("#criterion").select_option("latent_difference")
    body = ask(page, "a red circle")
    assert body["modalities"] == ["image"] and "temperature" not in body
    (choice,) = answer(client, body)["choices"]
    assert steps_of(page.locator(".positions .token")) == choice["exit_steps"] and len(choice["exit_steps"]) > 1
    total, count = sum(choice["exit_steps"]), len(choice["exit_steps"])
    expect_text(page.locator(".summary"), f"{count} positions · {total} core steps · mean {total / count:.1f}")
    drawn = {name: body[name] for name in ("model", "seed", "num_steps", "exit_criterion")}
    drawn["prompt"] = "a red circle"
    data = answer(client, drawn, "/v1/images/generations")["data"][0]["b64_json"]
    image = page.locator(".assistant img")
    assert image.get_attribute("src") == f"data:image/png;base64,{data}"
    assert image.evaluate("(it) => it.decode().then(() => it.naturalWidth)") == 32
    with page.expect_download() as saved:
        page.locator(".assistant").get_by_role("link", name="Save").click()
    assert saved.value.path().read_bytes() == base64.b64decode(data)


def test_an_image_is_shown_while_it_is_drawn(page):
    """Each replaces the one before; one that does not become complete says so."""
    page.locator("#model").select_option("artist")
    page.locator("#kind").select_option("image")
    urls = [f"data:image/png;base64,{base64.b64encode(image_file(picture(seed=it))).decode()}" for it in (0, 1)]
    drawn = [{"type": "image_url", "partial": it == 0, "image_url": {"url": url}} for it, url in enumerate(urls)]
    fake(page, event_stream(({"images": drawn[:1]}, {}), ({"images": drawn[1:]}, {})) + "data: [DONE]\n\n")
    ask(page)
    assert page.locator(".assistant img").get_attribute("src") == urls[1]
    expect_visible(page.get_by_role("link", name="Save"))
    fake(page, event_stream(({"images": drawn[:1]}, {})))
    ask(page)
    last = page.locator(".assistant").last
    assert last.locator("img").get_attribute("alt") == "Image of the reply, not complete"
    expect_text(last, "The reply ended before it was complete.")


def test_sound_is_made(page, client):
    page.locator("#model").select_option("artist")
    page.locator("#kind").select_option("audio")
    page.locator("#seed").fill("7")
    body = ask(page, "hello")
    data = answer(client, body)["choices"][0]["message"]["audio"]["data"]
    player = page.locator(".assistant audio")
    assert player.get_attribute("src") == f"data:audio/wav;base64,{data}" and player.get_attribute("controls") == ""
    seconds = len(soundfile.read(io.BytesIO(base64.b64decode(data)))[0]) / 8000
    page.wait_for_function("(it) => it.duration > 0", arg=player.element_handle())
    assert player.evaluate("(it) => it.duration") == pytest.approx(seconds, abs=0.05)


# --------------------------------------------------------------------------------------------------------------- export


def test_what_is_exported_is_learned(page, runs, tmp_path):
    """A line of messages, which fine-tuning reads; what the server refused is not in it."""
    page.locator("#system").fill("Be brief.")
    ask(page)
    ask(page, "a" * 300)
    expect_text(page.locator(".assistant .problem:visible"), "status 400")
    with page.expect_download() as saved:
        page.locator("#export").click()
    assert saved.value.suggested_filename == "conversation.jsonl"
    saved.value.save_as(tmp_path / "conversation.jsonl")
    reply = {"role": "assistant", "content": page.locator(".assistant .tokens").first.inner_text()}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}, reply]
    assert json.loads((tmp_path / "conversation.jsonl").read_text()) == {"messages": messages}
    _, tokenizer = load_model(runs / "talker")
    given = SourceConfig("chat", paths=[str(tmp_path / "conversation.jsonl")])
    held_out = SourceConfig("generated", task="calculator", num_rows=2)
    (row,) = build_datasets(DataConfig([given], [held_out], block_size=200, packing=False), tokenizer).train
    learned = [label for label in row["labels"].tolist() if label != -100]
    assert tokenizer.decode(learned, skip_special_tokens=True) == reply["content"]


def test_media_are_exported_as_files_beside_their_line(page, tmp_path):
    page.locator("#model").select_option("artist")
    page.locator("#image-file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": PICTURE})
    expect_count(page.locator("#attachments li"), 1)
    page.locator("#kind").select_option("audio")
    ask(page, "play it")
    with page.expect_download() as saved:
        page.locator("#export").click()
    with zipfile.ZipFile(saved.value.path()) as archive:
        assert archive.testzip() is None
        archive.extractall(tmp_path)
    (line,) = (tmp_path / "conversation.jsonl").read_text().splitlines()
    user, assistant = parse_messages(json.loads(line)["messages"], {}, tmp_path)
    assert text_of(user) == "play it"
    (image,), (played,) = media_of([user]), media_of([assistant])
    assert image["type"] == "image" and Path(image["path"]).read_bytes() == PICTURE
    assert played["type"] == "audio" and soundfile.info(played["path"]).samplerate == 8000


# --------------------------------------------------------------------------------------------------------------- server


def test_a_key_is_asked_for(open_page):
    page = open_page(key=None)
    field = page.get_by_label("Key", exact=True)
    expect_focused(field)
    field.fill("wrong-key")
    field.press("Enter")
    expect_text(page.locator("#key-reason"), "did not accept this key")
    field.fill(KEY)
    field.press("Enter")
    expect_text(page.locator("#facts"), "talker")
    assert page.evaluate("[sessionStorage.getItem('key'), localStorage.length, document.cookie]") == [KEY, 0, ""]
    page.evaluate("sessionStorage.setItem('key', 'old-key-now')")
    page.locator("#prompt").fill(QUESTION)
    page.locator("#prompt").press("Enter")
    expect_visible(page.get_by_role("dialog"))
    page.keyboard.press("Escape")
    expect_text(page.locator(".assistant .problem:visible"), "status 401): a key is needed")


def test_a_server_that_is_gone_is_noticed(page):
    banner = page.get_by_role("alert").first
    expect_visible(banner, False)
    page.context.set_offline(True)
    expect_text(banner, "The server does not answer.")
    ask(page)
    expect_text(page.locator(".assistant .problem:visible"), "The server does not answer.")
    page.context.set_offline(False)
    expect_visible(banner, False)
    expect_text(page.get_by_role("status"), "The server answers again.")
    page.route("**/health", lambda route: route.fulfill(status=503, body="{}"))
    expect_text(banner, "workers is ready")
    page.get_by_role("button", name="Regenerate").click()
    expect_text(page.locator(".assistant .tokens"), "calculator(2*21)")


def test_models_that_came_late_are_shown(open_page):
    page = open_page(key=None)
    page.get_by_role("button", name="Cancel").click()
    expect_text(page.locator("#facts"), "a key is needed")
    page.evaluate(f"sessionStorage.setItem('key', '{KEY}')")
    page.get_by_role("button", name="Ask again").click()
    expect_text(page.locator("#facts"), "35.7 thousand parameters · reads text")
    expect_text(page.locator("#about"), "This is a research model. What it says may be wrong or made up.")


def test_what_the_server_says_of_a_request_is_shown(page):
    ask(page, "a" * 300)
    expect_text(page.locator(".assistant .problem:visible"), "more than 190")
    fake(page, 'data: {"error": {"message": "the worker has died", "type": "server_error"}}\n\n')
    ask(page)
    expect_text(page.locator(".assistant .problem:visible").last, "The server failed: the worker has died")
    page.locator("#temperature").fill("")
    page.locator("#prompt").fill(QUESTION)
    page.locator("#prompt").press("Enter")
    expect_focused(page.locator("#temperature"))


# ------------------------------------------------------------------------------------------------------------ everybody


def test_it_is_used_with_the_keyboard_alone(page):
    page.reload()  # so that the focus is where everybody begins
    expect_text(page.locator("#facts"), "talker")
    page.keyboard.press("Tab")
    expect_focused(page.get_by_role("link", name="Skip to the message"))
    page.keyboard.press("Enter")
    expect_focused(page.locator("#prompt"))
    page.keyboard.type("What is")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("2*21?")
    assert page.locator("#prompt").input_value() == "What is\n2*21?"
    with page.expect_request(f"**{CHAT}") as sent:
        page.keyboard.press("Enter")
    assert sent.value.post_data_json["messages"][0]["content"] == "What is\n2*21?"
    expect_visible(page.locator("#send"))
    expect_text(page.get_by_role("status"), "Reply: ")
    while page.evaluate("document.activeElement.className") != "token":
        page.keyboard.press("Shift+Tab")
    tokens = page.locator(".token")
    expect_focused(tokens.first)
    page.keyboard.press("ArrowRight")
    expect_focused(tokens.nth(1))
    expect_text(page.get_by_role("tooltip"), f"3 steps {tokens.nth(1).text_content()}")
    assert tokens.nth(1).get_attribute("aria-describedby") == "tip"
    page.keyboard.press("End")
    expect_focused(tokens.last)
    expect_text(page.get_by_role("tooltip"), "no text")
    page.keyboard.press("Escape")
    expect_visible(page.get_by_role("tooltip"), False)


def test_replies_are_announced_once(page):
    """Whoever listens hears that the model writes, then the whole reply, and no tokens."""
    page.evaluate("""() => {
        window.heard = [];
        new MutationObserver(() => heard.push(document.getElementById("status").textContent))
            .observe(document.getElementById("status"), { childList: true });
    }""")
    ask(page)
    heard = page.evaluate("heard")
    assert len(heard) == 2 and heard[0] == "The model writes." and heard[1].startswith("Reply: calculator(2*21)")
    assert page.locator("[aria-live]").get_attribute("aria-live") == "off"


def test_a_narrow_screen_needs_no_scrolling_to_the_side(open_page):
    page = open_page(width=320, height=640)
    fits = "document.documentElement.scrollWidth <= 320"
    assert page.evaluate(fits)
    page.get_by_role("button", name="Settings").click()
    page.locator("#model").select_option("artist")
    page.locator("#criterion").select_option("cosine")
    assert page.evaluate(fits)
    page.get_by_role("button", name="Settings").click()
    page.locator("#image-file").set_input_files({"name": "a" * 80, "mimeType": "image/png", "buffer": PICTURE})
    page.locator("#audio-file").set_input_files({"name": "a.wav", "mimeType": "audio/wav", "buffer": SOUND})
    expect_count(page.locator("#attachments li"), 2)
    assert page.evaluate(fits)
    ask(page, "w" * 60)
    page.locator(".token").first.hover()
    assert page.evaluate(fits)
    page.get_by_text("Side by side", exact=True).first.click()
    ask(page, "w" * 60)
    assert page.evaluate(fits)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(open_page, scheme):
    from axe_playwright_python.sync_playwright import Axe

    def look(page):
        found = Axe().run(page).response["violations"]
        serious = [it for it in found if it["impact"] in ("serious", "critical")]
        assert not serious, json.dumps(serious, indent=1)

    page = open_page(color_scheme=scheme, reduced_motion="reduce")
    page.locator("#model").select_option("artist")
    page.locator("#criterion").select_option("cosine")
    page.locator("#numbers").check()
    for steps in range(1, 9):  # a token of each colour
        fake(page, event_stream(({"content": "word"}, {"tokens": ["word"], "exit_steps": [steps]})))
        ask(page)
    page.unroute(f"**{CHAT}")
    page.locator("#image-file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": PICTURE})
    page.locator("#audio-file").set_input_files({"name": "a.wav", "mimeType": "audio/wav", "buffer": SOUND})
    expect_count(page.locator("#attachments li"), 2)
    page.locator(".token").first.focus()
    look(page)
    for kind in ("image", "audio"):
        page.locator("#kind").select_option(kind)
        ask(page)
    page.locator(".user").first.get_by_role("button", name="Edit").click()
    look(page)
    page.get_by_text("Side by side", exact=True).first.click()
    page.locator("#kind").select_option("text")
    ask(page)
    look(page)
    page.context.set_offline(True)
    expect_visible(page.locator("#banner"))
    look(page)
    page.context.set_offline(False)
    page.evaluate("void askForKey(true)")
    look(page)
