"""The command line that continues a text."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TextStreamer

from inference.generate import encode_prompt, main, write_continuation
from model import RecurrentCache
from model.exit_criteria import ExitOptions
from tests.tiny_language_model import save_checkpoint, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(save_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def plain_checkpoint(tmp_path_factory):
    return str(save_checkpoint(tmp_path_factory.mktemp("plain"), num_core_layers=0))


def run(capsys, *argv):
    assert main(argv) == 0
    return capsys.readouterr().out


def reference(prompt, num_steps, max_new_tokens):
    """Greedy decoding without `generate`: the whole text through the model again for each token."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    ids = [1, *tokenizer(prompt)["input_ids"]]
    length = len(ids)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids]), num_steps=num_steps).logits[0, -1].argmax().item())
        if ids[-1] == 2:
            break
    return tokenizer.decode(ids[length:], skip_special_tokens=True)


@pytest.mark.parametrize("num_steps", [1, 6])
def test_greedy_text_is_that_of_a_plain_loop(checkpoint, capsys, num_steps):
    """The begin token stands in front of the prompt, the depth reaches the model, the text is all that is written."""
    expected = reference("the cat", num_steps, 12)
    argv = [checkpoint, "--prompt", "the cat", "--greedy", "--num-steps", str(num_steps), "--max-new-tokens", "12"]
    assert run(capsys, *argv) == expected + "\n"
    assert run(capsys, *argv, "--no-stream") == expected + "\n"


def test_exits_reach_the_model_and_their_steps_are_logged(checkpoint, capsys):
    """Against the model by hand, token by token."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    ids, cache, steps = torch.tensor([[1, *tokenizer("the cat")["input_ids"]]]), RecurrentCache(model.config), []
    chunk, length = ids, ids.shape[1]
    exits = {"exits": ExitOptions("latent_difference", 0.5)}
    for _ in range(6):
        with torch.no_grad():
            out = model(chunk, cache=cache, num_steps=9, **(exits if steps else {}))
        chunk = out.logits[:, -1:].argmax(-1)
        ids = torch.cat((ids, chunk), dim=1)
        steps.append(int(out.exit_steps[0]))
    assert len(set(steps)) > 1
    argv = [checkpoint, "--prompt", "the cat", "--greedy", "--num-steps", "9", "--max-new-tokens", "6"]
    argv += ["--exit-criterion", "latent_difference", "--exit-threshold", "0.5", "--log-level", "info"]
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert captured.out == tokenizer.decode(ids[0, length:], skip_special_tokens=True) + "\n"
    assert f"core steps per new token: {sum(steps) / 6:.2f}" in captured.err


def test_depth_left_out_is_the_mean(checkpoint, capsys):
    text = run(capsys, checkpoint, "--prompt", "on the mat", "--greedy", "--max-new-tokens", "8")
    assert text == reference("on the mat", 3, 8) + "\n"


def test_a_plain_model_generates_too(plain_checkpoint, capsys):
    assert run(capsys, plain_checkpoint, "--prompt", "the", "--greedy", "--max-new-tokens", "3")


def test_the_seed_decides_the_draws(checkpoint, capsys):
    argv = [checkpoint, "--prompt", "the cat", "--max-new-tokens", "16", "--temperature", "2"]
    texts = [run(capsys, *argv, "--seed", seed) for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_one_likeliest_token_is_greedy(checkpoint, capsys):
    """top-k of 1 and a tiny nucleus leave one token, so a draw is the greedy choice."""
    greedy = run(capsys, checkpoint, "--prompt", "the cat", "--greedy", "--max-new-tokens", "10")
    for option in (["--top-k", "1"], ["--top-p", "1e-6"]):
        assert run(capsys, checkpoint, "--prompt", "the cat", "--sample", "--max-new-tokens", "10", *option) == greedy


def test_prompt_from_standard_input(checkpoint, capsys, monkeypatch):
    expected = run(capsys, checkpoint, "--prompt", "the cat", "--greedy", "--max-new-tokens", "5")
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n"))
    assert run(capsys, checkpoint, "--greedy", "--max-new-tokens", "5") == expected


def test_characters_split_over_tokens_come_whole(capsys):
    """Each piece that is written is valid text; a stand-in model says the bytes one token at a time."""
    tokenizer = tiny_tokenizer(vocab_size=259)  # the bytes and nothing else
    text = "naïve 日本 語😀 — é x"
    ids = torch.tensor(tokenizer(text)["input_ids"])
    assert len(ids) == len(text.encode("utf-8"))
    pieces = []

    class Recorder(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            pieces.append(text)

    streamer = Recorder(tokenizer, skip_special_tokens=True)
    for token in ids:
        streamer.put(token[None])
    streamer.end()
    assert "".join(pieces) == text and len([piece for piece in pieces if piece]) > 3
    assert all("\ufffd" not in piece for piece in pieces)

    class Speaker:
        def generate(self, input_ids, streamer, **options):
            for part in (input_ids, *ids[:, None], torch.tensor([2])):
                streamer.put(part)
            streamer.end()

    write_continuation(Speaker(), tokenizer, {"input_ids": torch.tensor([[1, 5]])}, stream=True, options={})
    assert capsys.readouterr().out == text + "\n"


def test_a_prompt_gets_exactly_one_begin_token():
    tokenizer = tiny_tokenizer()
    inputs = encode_prompt(tokenizer, "the cat")
    assert inputs["input_ids"].tolist() == [[1, *tokenizer("the cat")["input_ids"]]]
    assert inputs["attention_mask"].shape == inputs["input_ids"].shape and inputs["attention_mask"].all()


def test_special_tokens_in_a_prompt_are_text(checkpoint, capsys):
    """As in the documents of training: the end token would otherwise end the prompt in its middle."""
    tokenizer = tiny_tokenizer()
    ids = encode_prompt(tokenizer, "a<|end|>b<|pad|>")["input_ids"][0].tolist()
    assert ids[0] == 1 and set(ids[1:]) & {0, 1, 2} == set()
    assert tokenizer.decode(ids[1:]) == "a<|end|>b<|pad|>"
    assert tokenizer("<|end|>")["input_ids"] == [2]  # whoever asks for the token itself still gets it


def test_a_prompt_that_is_not_utf8_is_one_line(checkpoint, capsys, monkeypatch):
    """As an argument, where Python keeps such bytes as surrogates, and on standard input."""
    check_error(capsys, [checkpoint, "--prompt", os.fsdecode(b"caf\xe9")], "the prompt is not UTF-8 (surrogates not")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    check_error(capsys, [checkpoint], "the prompt is not UTF-8 (invalid continuation byte at 3): convert it")


BAD_ARGUMENTS = [
    (["--num-steps", "0"], "argument --num-steps: 0 is less than 1: give the number of times the core is applied"),
    (["--num-steps", "-1"], "argument --num-steps: -1 is less than 1: give the number of times"),
    (["--num-steps", "x"], "argument --num-steps: 'x' is not a whole number: give the number of times"),
    (["--num-steps", "2.5"], "argument --num-steps: '2.5' is not a whole number"),
    (["--max-new-tokens", "0"], "argument --max-new-tokens: 0 is less than 1: give the number of tokens to generate"),
    (["--max-new-tokens", "-5"], "argument --max-new-tokens: -5 is less than 1"),
    (
        ["--temperature", "0"],
        "argument --temperature: 0 is not above 0: for temperature 0, the likeliest token, use --greedy",
    ),
    (["--temperature", "-0.5"], "argument --temperature: -0.5 is not above 0"),
    (["--temperature", "nan"], "argument --temperature: 'nan' is not finite"),
    (["--temperature", "hot"], "argument --temperature: 'hot' is not a number"),
    (["--top-p", "0"], "argument --top-p: 0 is not a probability above 0 and at most 1"),
    (["--top-p", "1.5"], "argument --top-p: 1.5 is not a probability above 0 and at most 1"),
    (
        ["--top-k", "-1"],
        "argument --top-k: -1 is less than 0: give the number of likeliest tokens to draw from; 0 draws",
    ),
    (
        ["--repetition-penalty", "0"],
        "argument --repetition-penalty: 0 is not above 0: give a factor; 1 changes nothing",
    ),
    (["--seed", "-1"], "argument --seed: -1 is less than 0"),
    (["--greedy", "--sample"], "argument --sample: not allowed with argument --greedy"),
    (["--greedy", "--top-p", "0.9"], "--top-p has no effect with --greedy: leave one of the two out"),
    (["--prompt", ""], "the prompt is empty: give --prompt TEXT, or a text on standard input"),
    (["--prompt", " \n"], "the prompt is empty"),
    (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8' (choose from"),
    (["--device", "cuda:99"], "Device 'cuda:99' does not work here ("),
    (["--device", "toaster"], "Device 'toaster' does not work here ("),
    (["--device", "meta"], "Device 'meta' does not work here ("),
    (["--log-level", "loud"], "argument --log-level: invalid choice: 'loud'"),
    (["--exit-criterion", "patience"], "argument --exit-criterion: invalid choice: 'patience' (choose from"),
    (["--exit-criterion", "cosine", "--exit-threshold", "7"], "exit_threshold of cosine must be above 0 and at most 2"),
    (["--exit-threshold", "0.1"], "--exit-threshold has no effect without --exit-criterion: name one, or leave it out"),
    (["--num-step", "4"], "unknown argument '--num-step': did you mean --num-steps?"),
    (["--temprature=1"], "unknown argument '--temprature': did you mean --temperature?"),
    (["--zzz"], "unknown argument '--zzz': see --help"),
]


@pytest.mark.parametrize(("argv", "message"), BAD_ARGUMENTS, ids=[" ".join(argv) for argv, _ in BAD_ARGUMENTS])
def test_bad_arguments_are_one_line(checkpoint, capsys, argv, message):
    """One line on standard error that names value, reason and fix; exit code 2; nothing on standard output."""
    check_error(capsys, [checkpoint, "--prompt", "the cat", *argv], message)


def check_error(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    found = capsys.readouterr()
    assert stop.value.code == 2 and found.out == ""
    assert found.err.startswith("inference.generate: error: ") and found.err.count("\n") == 1
    assert message in found.err


def test_bad_checkpoints_are_one_line(tmp_path, capsys):
    """Missing, no checkpoint, and a file."""
    missing = str(tmp_path / "nowhere")
    check_error(
        capsys, [missing, "--prompt", "x"], f"{missing} does not exist: give the folder of a run or of a checkpoint"
    )
    (tmp_path / "empty").mkdir()
    check_error(
        capsys,
        [str(tmp_path / "empty"), "--prompt", "x"],
        "holds no complete model (it has no config.json) and no checkpoint-N folder: give the folder",
    )
    (tmp_path / "file").write_text("x")
    check_error(capsys, [str(tmp_path / "file"), "--prompt", "x"], "is a file: give the folder")


def test_a_depth_for_a_model_without_core_is_an_error(plain_checkpoint, capsys):
    check_error(
        capsys,
        [plain_checkpoint, "--prompt", "x", "--num-steps", "4"],
        "--num-steps 4 was given, but this model has no core to repeat (num_core_layers is 0): leave it out",
    )


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    options = "prompt num-steps max-new-tokens temperature top-k top-p repetition-penalty seed greedy sample no-stream"
    for option in [*options.split(), "device", "dtype", "log-level"]:
        assert re.search(rf"--{option}\b", text)


@pytest.mark.slow
def test_the_command_from_another_folder(checkpoint, tmp_path):
    """A real process, in another folder, reads standard input and streams UTF-8."""
    command = [sys.executable, "-m", "inference.generate", checkpoint, "--greedy", "--num-steps", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, "--max-new-tokens", "8"],
        input="the cat",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == reference("the cat", 2, 8) + "\n"
    result = subprocess.run([*command, "--top-p", "2"], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 2 and result.stdout == ""
    assert "--top-p: 2 is not a probability above 0 and at most 1" in result.stderr
