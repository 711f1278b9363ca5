"""What the data of a run refuse or read all the same, handed to the processor: the same is refused, with one line that
says why, and the same is read.
"""

import re
import tracemalloc

import pytest
import torch

from model import MediaError
from tests.test_data_media_bad import BAD, GOOD, long_recording
from tests.tiny_processor import picture, sound, tiny_processor
from tests.tiny_reader import tiny_reader

PROCESSOR = tiny_processor()
PROMPT = "<|begin|><|user|><|{}|>what?<|assistant|>"
REASONS = {"missing": "does not exist"}
"""Where they differ from those of rows, which are compared with the files of a folder first."""


def kind_of(name: str) -> str:
    return "audio" if name.endswith(("wav", "flac")) else "image"


def by_text(kind: str, source) -> dict:
    given = {"images" if kind == "image" else kind: source}
    return PROCESSOR(text=PROMPT.format(kind), **given, add_special_tokens=False, return_tensors="pt")


def by_messages(kind: str, source) -> dict:
    parts = [{"type": kind, kind: source}, {"type": "text", "text": "what?"}]
    return PROCESSOR.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def alone(kind: str, source) -> dict:
    return PROCESSOR(**{"images" if kind == "image" else kind: source}, return_tensors="pt")


WAYS = (by_text, by_messages, alone)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_refused(tmp_path, case):
    """From a file and, where there is one, from its bytes."""
    name, content, reason = BAD[case]
    sources = [str(tmp_path / name)]
    if content is not None:
        (tmp_path / name).write_bytes(content)
        sources.append(content)
    for way in WAYS:
        for source in sources:
            with pytest.raises(MediaError) as error:
                way(kind_of(name), source)
            message = str(error.value)
            assert "\n" not in message
            if isinstance(source, str):
                assert re.search(REASONS.get(case, reason), message) and name in message


@pytest.mark.parametrize("case", GOOD)
def test_what_is_unusual_is_read(tmp_path, case):
    """The same whichever way, as many tokens as the header promises, and the model can read it."""
    name, content = GOOD[case]
    kind, path = kind_of(name), tmp_path / name
    path.write_bytes(content)
    batches = [way(kind, source) for way in WAYS for source in (str(path), content)]
    whole = batches[0]
    for batch in batches[1:]:
        assert all(torch.equal(tensor, whole[key]) for key, tensor in batch.items())
    model = tiny_reader(scale=1.0)
    count = (whole["input_ids"] == getattr(model.config, f"{kind}_token_id")).sum()
    assert PROCESSOR.num_media_tokens(kind, PROCESSOR.item_size(kind, str(path))) == count + 2
    usual = by_messages(kind, picture(seed=9) if kind == "image" else sound(seed=9))
    with torch.no_grad():
        logits, other = (model(**batch).logits[0, -1] for batch in (whole, usual))
    assert torch.isfinite(logits).all() and not torch.equal(logits, other)


def test_of_ten_hours_the_beginning_is_read(tmp_path):
    """Of 288 MB no more than the two seconds that the processor wants. The file is a hole, but for its header."""
    path = tmp_path / "x.wav"
    with path.open("wb") as file:
        file.write(long_recording()[:44])
        file.truncate(44 + 8000 * 36_000)
    tracemalloc.start()
    batches = [way("audio", str(path)) for way in WAYS]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(batch["input_features"].shape == (1, 16, 201) for batch in batches)
    assert PROCESSOR.item_size("audio", str(path)) == 36_000 and peak < 40e6
    assert PROCESSOR.num_media_tokens("audio", 36_000) == 51 + 2
