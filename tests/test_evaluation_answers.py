"""What is written against what should be: scores by hand, and answers to media against decoding one by one."""

import json
import random
from collections import Counter

import pytest
import torch
from torchmetrics.functional.text import bleu_score, char_error_rate, word_error_rate
from transformers import PreTrainedConfig

from dataset_loading import Collator
from evaluation.answers import Answer, AnswerGenerator, TextScores, attributes_right, prompt_of, shares, text_scores
from evaluation.depth import DepthRow, ExactMatch, ModalityScores, depth_table
from evaluation.intervals import wilson_interval
from evaluation.metrics import token_byte_lengths
from evaluation.results import save_depth_table
from evaluation.tables import markdown_table
from tests.test_callbacks_media import AUDIO, IMAGE, NAMES, answer, chat, row
from tests.tiny_artist import CODES, artist_processor, tiny_artist
from tests.tiny_language_model import tiny_model, tiny_tokenizer
from tests.tiny_processor import picture, sound, tiny_processor
from tests.tiny_reader import tiny_reader


def answers_of(*pairs, **options):
    return [
        Answer(**{"modality": "text", "difficulty": None, "is_right": False, "attributes": None, **options},
               reference=reference, generated=written)
        for reference, written in pairs
    ]  # fmt: skip


# Scores


def distance(one, other):
    """Least number of replacements, deletions and insertions, by the recursion that defines it."""
    if not one or not other:
        return len(one) + len(other)
    if one[0] == other[0]:
        return distance(one[1:], other[1:])
    return 1 + min(distance(one[1:], other), distance(one, other[1:]), distance(one[1:], other[1:]))


def test_error_rates_are_those_of_the_definition():
    """Over all texts together: distances divided by the length of the references."""
    pairs = [("one two", "one too"), ("three", "three three"), ("four five six", "six"), ("a", "")]
    scores = text_scores(answers_of(*pairs))
    words = sum(distance(reference.split(), written.split()) for reference, written in pairs)
    assert scores.word_error_rate == pytest.approx(words / 7)
    characters = sum(distance(list(reference), list(written)) for reference, written in pairs)
    assert scores.character_error_rate == pytest.approx(characters / sum(len(reference) for reference, _ in pairs))
    assert scores.exact_match == 0 and scores.num_examples == 4


def test_blanks_at_the_ends_of_a_reference_are_no_error():
    scores = text_scores(answers_of((" one two\n", "one two")))
    assert scores.exact_match == 1 and scores.word_error_rate == scores.character_error_rate == 0


def bleu(pairs, longest):
    """Of a corpus, from n-gram counts: Papineni et al. 2002."""
    score = 1.0
    for n in range(1, longest + 1):
        right = total = 0
        for reference, written in pairs:
            grams = [Counter(zip(*(text.split()[i:] for i in range(n)))) for text in (reference, written)]  # noqa: B905
            right += sum((grams[0] & grams[1]).values())
            total += sum(grams[1].values())
        score *= (right / total) ** (1 / longest)
    lengths = [sum(len(pair[side].split()) for pair in pairs) for side in (0, 1)]
    return score * min(1.0, torch.tensor(1 - lengths[0] / lengths[1]).exp().item())


def test_bleu_is_that_of_the_definition():
    pairs = [
        ("a small red circle left of a large blue square", "a small red circle left of a small blue square"),
        ("a large green star above a small red ring", "a large green star below a red ring"),
    ]
    assert text_scores(answers_of(*pairs)).bleu == pytest.approx(bleu(pairs, 4), rel=1e-4)


def test_bleu_of_short_answers_counts_the_n_grams_there_are():
    """With four words in none of them, right answers would have 0."""
    assert text_scores(answers_of(("C4 E4 G4", "C4 E4 G4"), ("A4", "A4"))).bleu == 1
    pairs = [("C4 E4 G4", "C4 E4 A4"), ("A4 B4 C5", "A4 B4 C5")]
    assert text_scores(answers_of(*pairs)).bleu == pytest.approx(bleu(pairs, 3), rel=1e-4)


def test_word_scores_are_those_of_torchmetrics_and_intervals_hold_them():
    """Of random texts, some empty; the draws of the intervals have the corpus's own score in their midst."""
    draw, words = random.Random(0), ["red", "ring", "a", "of", "left"]
    texts = [" ".join(draw.choices(words, k=draw.randint(0, 9))) for _ in range(80)]
    pairs = [(text, " ".join(word if draw.random() < 0.8 else "star" for word in text.split())) for text in texts]
    scores, (references, written) = text_scores(answers_of(*pairs)), zip(*pairs, strict=True)
    assert scores.bleu == pytest.approx(bleu_score(written, [[it] for it in references]).item(), rel=1e-5)
    assert scores.word_error_rate == pytest.approx(word_error_rate(written, references).item(), rel=1e-5)
    assert scores.character_error_rate == pytest.approx(char_error_rate(written, references).item(), rel=1e-5)
    for name in (
        "exact_match",
        "word_error_rate",
        "character_error_rate",
        "bleu",
        "chrf",
        "rouge1",
        "rouge2",
        "rouge_l",
    ):
        low, high = scores.intervals[name]
        assert low < getattr(scores, name) < high < low + 0.35


def test_chrf_is_that_of_the_definition():
    """F2 of character n-grams without blanks, n = 1 to 6, over the corpus: Popović 2015."""
    pairs = [("a red ring", "a red rung"), ("two stars", "two squares")]
    shares = []
    for n in range(1, 7):
        right = found = wanted = 0
        for reference, written in pairs:
            texts = [text.replace(" ", "") for text in (reference, written)]
            grams = [Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in texts]
            right += sum((grams[0] & grams[1]).values())
            wanted, found = wanted + sum(grams[0].values()), found + sum(grams[1].values())
        shares.append((right / found, right / wanted))
    precision, recall = (sum(part) / 6 for part in zip(*shares, strict=True))
    expected = 5 * precision * recall / (4 * precision + recall)
    assert text_scores(answers_of(*pairs)).chrf == pytest.approx(expected, rel=1e-4)


SACREBLEU = [
    ([("a red ring", "a red rung"), ("two stars", "two squares")], 0.381619),
    ([("ab", "ac")], 0.250000),
    ([("red", "red ring")], 0.702364),
    ([("a", "b")], 0.000000),
    ([("C4 E4 G4", "C4 E4 A4"), ("A4", "A4")], 0.395833),
    ([("", "x"), ("a red ring", "a red star")], 0.264484),
    ([("große Straße", "grosse Straße"), ("中文", "中")], 0.575819),
    ([("a small red circle left of a blue square", "a red small circle to the left of one square")], 0.518337),
]


@pytest.mark.parametrize(("pairs", "expected"), SACREBLEU)
def test_chrf_is_that_of_sacrebleu(pairs, expected):
    """Values of sacrebleu 2.6, divided by 100."""
    assert text_scores(answers_of(*pairs)).chrf == pytest.approx(expected, abs=1e-6)


ROUGE = [
    ([("a red ring", "a red rung"), ("two stars", "two squares")], (0.583333, 0.25, 0.583333)),
    ([("The cat sat on the mat.", "the mat, on which THE cat sat")], (0.923077, 0.545455, 0.461538)),
]


@pytest.mark.parametrize(("pairs", "expected"), ROUGE)
def test_rouge_is_that_of_the_scorer_of_google(pairs, expected):
    """Values of rouge-score 0.1.2 without stemming, means over texts."""
    scores = text_scores(answers_of(*pairs))
    assert (scores.rouge1, scores.rouge2, scores.rouge_l) == pytest.approx(expected, abs=1e-6)


def test_rouge_counts_words_of_all_scripts_and_one_word_where_there_is_no_pair():
    scores = text_scores(answers_of(("große Straße", "grosse STRASSE Straße"), ("7", "8"), ("7", "7"), ("中", "中。")))
    assert scores.rouge1 == scores.rouge_l == pytest.approx((2 / 5 + 0 + 1 + 1) / 4)
    assert scores.rouge2 == pytest.approx((0 + 0 + 1 + 1) / 4)
    assert text_scores(answers_of(("+", "-"), ("+", "+"))).rouge2 == 0.5


@pytest.mark.parametrize("text", ["a", "red", "C4 E4", "a red ring", "\u00e4\u4e2d", ""])
def test_what_is_right_has_the_best_scores_however_short_it_is(text):
    for pairs in ([(text, text)], [(text, text), ("two stars", "two stars")], [(text, text), ("", "")]):
        scores = text_scores(answers_of(*pairs))
        assert (scores.exact_match, scores.bleu, scores.chrf) == (1, 1, 1), pairs
        assert (scores.rouge1, scores.rouge2, scores.rouge_l) == (1, 1, 1), pairs
        assert scores.word_error_rate == scores.character_error_rate == 0, pairs


def test_empty_references_divide_nothing_by_zero():
    scores = text_scores(answers_of(("", "two stars"), (" ", "")))
    assert (scores.exact_match, scores.bleu, scores.chrf) == (0.5, 0, 0)
    assert (scores.word_error_rate, scores.character_error_rate) == (2, 9)
    scores = text_scores(answers_of(("two stars", "")))
    assert (scores.exact_match, scores.bleu, scores.chrf) == (0, 0, 0)
    assert scores.word_error_rate == scores.character_error_rate == 1
    scores = text_scores(answers_of(("", "two"), ("a star", "a star")))
    assert scores.word_error_rate == pytest.approx(1 / 2) and scores.character_error_rate == pytest.approx(3 / 6)
    with pytest.raises(ValueError, match="0 answers have no scores"):
        text_scores([])


def test_attributes_are_those_of_the_reference():
    """Wrong, missing and superfluous ones; an answer of a source that names none counts in none."""

    def read(text):
        return dict(part.split("=") for part in text.split())

    answers = answers_of(("a=1 b=2", "a=1 b=3"), ("a=1", "b=2"), ("b=2", "a=9 b=2"), attributes=read)
    assert shares(attributes_right(answers + answers_of(("a=1", "a=2")))) == {"a": 1 / 2, "b": 1 / 2}
    assert text_scores(answers).attributes == {"a": 1 / 2, "b": 1 / 2}
    assert text_scores(answers_of(("x", "x"))).attributes == {}


# Writing


def media_example(processor, media, prompt, text, **more):
    encoded = row(processor, chat(media, prompt, text))
    ids, labels = encoded["input_ids"].tolist(), encoded["labels"].tolist()
    start = next(index for index, label in enumerate(labels) if label != -100)
    return {
        "input_ids": ids,
        "labels": labels,
        "prompt_ids": ids[:start],
        "media": encoded["media"],
        "modality": NAMES[encoded["modality_ids"][0]],
        "prompt": prompt,
        "answer": text,
        **more,
    }


def examples_with_media(processor):
    """Of each modality and of all at once, of several lengths."""
    return [
        media_example(processor, [IMAGE], "", "a red ring"),
        media_example(processor, [AUDIO], "which?", "C4"),
        media_example(processor, [], "nothing to see", "no"),
        media_example(processor, [{"type": "audio", "audio": sound(900)}, IMAGE, IMAGE], "how many?", "two"),
        media_example(processor, [{"type": "image", "image": picture(16, 48, seed=3)}], "?", "a star"),
    ]


@pytest.mark.parametrize("num_steps", [1, 4])
def test_written_in_batches_is_written_alone(num_steps):
    """Padded prompts with media of several lengths, against whole forward passes of each alone."""
    model, processor = tiny_reader(), tiny_processor()
    examples = examples_with_media(processor)
    found = AnswerGenerator(processor, max_new_tokens=5).write(model, examples, num_steps)
    alone = [answer(model, example, num_steps, 5).strip() for example in examples]
    assert found == alone and len(set(found)) > 2


def test_an_answer_is_cut_at_twice_its_reference_whatever_else_is_in_the_batch():
    """Of a model that never ends: letter tokens are bytes here, and the end token counts."""
    processor = tiny_processor()
    letter = processor.tokenizer.encode("a", add_special_tokens=False)

    class Endless:
        device, dtype, config = torch.device("cpu"), torch.float32, PreTrainedConfig()

        def generate(self, input_ids, max_new_tokens, **options):
            return torch.cat((input_ids, torch.tensor([letter * max_new_tokens] * len(input_ids))), dim=1)

    examples = examples_with_media(processor)
    found = AnswerGenerator(processor).write(Endless(), examples, 2)
    assert found == ["a" * 2 * (len(example["answer"]) + 1) for example in examples]
    assert AnswerGenerator(processor, 7).write(Endless(), examples, 2) == ["a" * 7] * len(examples)


def test_prompts_of_texts_end_where_labels_begin():
    assert prompt_of({"input_ids": [1, 5, 6, 7, 2], "labels": [-100, -100, 6, 7, 2]}) == [1, 5]
    assert prompt_of({"input_ids": [1, 5, 6], "labels": [-100, -100, 6], "prompt_ids": [1]}) == [1]


# The table


def texts_with_media(processor):
    """Validation rows by source: one of pictures, one of all kinds."""
    mixed = [([AUDIO], "which?", "C4"), ([], "say", "no"), ([IMAGE], "", "a ring"), ([AUDIO, IMAGE], "?", "two")]
    found = {
        "scenes": [row(processor, chat([IMAGE], "", text)) for text in ("a red ring", "b", "c d")],
        "mixed": [row(processor, chat(*parts)) for parts in mixed],
    }
    found["mixed"][0]["modality_ids"][-2:] = 0  # as where another document follows in the row
    return found


def test_the_table_has_losses_and_answers_by_source_modality_and_depth():
    """Against rows one by one."""
    model, processor = tiny_reader(), tiny_processor()
    texts, examples = texts_with_media(processor), examples_with_media(processor)
    lengths = token_byte_lengths(processor.tokenizer)
    table = depth_table(
        *(model, [1, 3], texts, {"first": examples[:2], "second": examples[2:]}, Collator(processor)),
        byte_lengths=lengths,
        batch_size=3,
        writer=AnswerGenerator(processor, max_new_tokens=4),
    )
    for depth_row in table:
        depth = depth_row.num_steps
        sums = {name: [0.0, 0, 0] for name in NAMES}
        for item in [*texts["scenes"], *texts["mixed"]]:
            ids, labels = item["input_ids"], item["labels"]
            with torch.no_grad():
                logits = model(ids[None], **processor.collate_media(item["media"]), num_steps=depth).logits[0]
            for place in range(1, len(ids)):
                if labels[place] != -100:
                    part = sums[NAMES[item["modality_ids"][place]]]
                    part[0] -= logits[place - 1].log_softmax(-1)[labels[place]].item()
                    part[1] += 1
                    part[2] += int(lengths[labels[place]])
        for name in NAMES:
            losses = depth_row.modalities[name].losses
            assert losses["loss"] == pytest.approx(sums[name][0] / sums[name][1], rel=1e-4)
            assert losses["bits_per_byte"] == pytest.approx(sums[name][0] / sums[name][2] / 0.693147, rel=1e-4)
        assert depth_row.loss == pytest.approx(
            sum(part[0] for part in sums.values()) / sum(part[1] for part in sums.values()), rel=1e-4
        )
        written = [answer(model, example, depth, 4).strip() for example in examples]
        for name, indices in (("text", [2]), ("image", [0, 4]), ("audio", [1, 3])):
            chosen = answers_of(*((examples[index]["answer"], written[index]) for index in indices))
            assert depth_row.modalities[name].generated == text_scores(chosen)
        chosen = answers_of(*((examples[index]["answer"], written[index]) for index in (2, 3, 4)))
        assert depth_row.generated["second"] == text_scores(chosen)


def test_a_modality_may_have_losses_or_answers_alone():
    processor = tiny_processor()
    texts = {"scenes": texts_with_media(processor)["scenes"]}
    examples = {"sounds": [media_example(processor, [AUDIO], "", "C4")]}
    (depth_row,) = depth_table(
        *(tiny_reader(), [1], texts, examples, Collator(processor)),
        writer=AnswerGenerator(processor, 2),
    )
    image, audio = depth_row.modalities["image"], depth_row.modalities["audio"]
    assert image.losses == depth_row.sources["scenes"] and image.exact_match is None and image.generated is None
    assert audio.losses == {} and audio.exact_match == 0 and audio.generated.num_examples == 1
    assert "text" not in depth_row.modalities


def test_what_is_written_is_right_where_every_token_is_the_likeliest():
    """A model's own answers are right, those spoilt at their last letter are not; in the last message alone, and by
    difficulty.
    """
    model, processor = tiny_reader(), tiny_processor()
    tokenizer = processor.tokenizer
    examples = []
    for seed in range(4):
        image = {"type": "image", "image": picture(seed=seed)}
        start = media_example(processor, [image], "?", "x")["prompt_ids"]
        media = processor.encode_chat(chat([image], "?", "x"))["media"]
        text = [*model.generate(
            torch.tensor([start]), **processor.collate_media(media), num_steps=2, max_new_tokens=3, do_sample=False
        )[0, len(start) :].tolist()]  # fmt: skip
        if seed % 2:
            text[-1] = 40 if text[-1] != 40 else 41
        ids = [*start, *text]
        labels = [-100, 7, *[-100] * (len(start) - 2), *text]  # a label before the answer does not count
        decoded = tokenizer.decode(text, skip_special_tokens=True)
        examples.append({"input_ids": ids, "labels": labels, "prompt_ids": start, "media": media, "answer": decoded,
                         "modality": "image", "difficulty": 1 + seed // 2})  # fmt: skip
    texts = {"scenes": [row(processor, chat([IMAGE], "", "a"))]}
    table = depth_table(
        *(model, [2], texts, {"scenes": examples}, Collator(processor)),
        writer=AnswerGenerator(processor, max_new_tokens=3),
    )
    match = table[0].exact_match["scenes"]
    assert (match.total, match.num_examples, match.by_difficulty) == (0.5, 4, {1: 0.5, 2: 0.5})
    assert match.interval == wilson_interval(2, 4) and match.difficulty_intervals[1] == wilson_interval(1, 2)
    assert table[0].generated["scenes"].exact_match == table[0].modalities["image"].exact_match == 0.5


def test_a_model_of_text_writes_too_and_has_no_modalities():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    ids = tokenizer("the cat sat on")["input_ids"]
    example = {"input_ids": [1, *ids, 2], "labels": [-100] * 3 + [*ids, 2][2:], "answer": tokenizer.decode(ids[2:])}
    (depth_row,) = depth_table(
        *(model, [2], {"text": [{"input_ids": ids, "labels": ids}]}, {"cats": [example]}, Collator(tokenizer)),
        writer=AnswerGenerator(tokenizer, max_new_tokens=3),
    )
    output = model.generate(torch.tensor([[1, *ids[:2]]]), num_steps=2, max_new_tokens=3, do_sample=False)
    written = tokenizer.decode(output[0, 3:], skip_special_tokens=True)
    expected = text_scores(answers_of((example["answer"], written.strip())))
    assert depth_row.generated == {"cats": expected} and depth_row.modalities == {}


# The report


def known_rows():
    def written(share):
        return TextScores(8, share, 1 - share, 0.5, share / 2, 0.75, 0.5, share, 0.25, {"colour": share, "shape": 0.25})

    def at(steps, share):
        match = ExactMatch(share, 8)
        return DepthRow(
            *(steps, 2.5, 12.18, None, 0.5, {"scenes": {"loss": 2.5}}, {"scenes": match}),
            generated={"scenes": written(share)},
            modalities={
                "text": ModalityScores({"loss": 3.0, "perplexity": 20.1}, None, None),
                "image": ModalityScores({"loss": 2.25, "perplexity": 9.5}, share, written(share)),
                "audio": ModalityScores({}, share, written(share)),
            },
        )

    return [at(1, 0.25), at(16, 1.0)]


def test_markdown_has_a_table_of_modalities_and_one_of_texts():
    text = markdown_table(known_rows())
    assert text.split("\n\n")[1:] == [
        "By modality:",
        "| modality | steps |   loss |   exact |    WER |    CER |   BLEU |   chrF | ROUGE-1 | ROUGE-2 | ROUGE-L |\n"
        "| -------: | ----: | -----: | ------: | -----: | -----: | -----: | -----: | ------: | ------: | ------: |\n"
        "|     text |     1 | 3.0000 |       - |      - |      - |      - |      - |       - |       - |       - |\n"
        "|     text |    16 | 3.0000 |       - |      - |      - |      - |      - |       - |       - |       - |\n"
        "|    image |     1 | 2.2500 |  25.0 % | 75.0 % | 50.0 % | 12.5 % | 75.0 % |  50.0 % |  25.0 % |  25.0 % |\n"
        "|    image |    16 | 2.2500 | 100.0 % |  0.0 % | 50.0 % | 50.0 % | 75.0 % |  50.0 % | 100.0 % |  25.0 % |\n"
        "|    audio |     1 |      - |  25.0 % | 75.0 % | 50.0 % | 12.5 % | 75.0 % |  50.0 % |  25.0 % |  25.0 % |\n"
        "|    audio |    16 |      - | 100.0 % |  0.0 % | 50.0 % | 50.0 % | 75.0 % |  50.0 % | 100.0 % |  25.0 % |",
        "Texts generated for scenes (8):",
        "| steps | exact text |    WER |    CER |   BLEU |   chrF | ROUGE-1 | ROUGE-2 | ROUGE-L |  colour |  shape |\n"
        "| ----: | ---------: | -----: | -----: | -----: | -----: | ------: | ------: | ------: | ------: | -----: |\n"
        "|     1 |     25.0 % | 75.0 % | 50.0 % | 12.5 % | 75.0 % |  50.0 % |  25.0 % |  25.0 % |  25.0 % | 25.0 % |\n"
        "|    16 |    100.0 % |  0.0 % | 50.0 % | 50.0 % | 75.0 % |  50.0 % | 100.0 % |  25.0 % | 100.0 % | 25.0 % |\n",
    ]


def test_saved_files_hold_them_too(tmp_path):
    json_path, markdown_path, picture_path = save_depth_table(known_rows(), tmp_path, {})
    rows = json.loads(json_path.read_text())["rows"]
    assert rows[1]["generated"]["scenes"]["attributes"] == {"colour": 1.0, "shape": 0.25}
    assert rows[0]["modalities"]["image"]["generated"]["word_error_rate"] == 0.75
    assert markdown_path.read_text() == markdown_table(known_rows())
    from PIL import Image

    with Image.open(picture_path) as image:
        assert image.size == (1560, 960)
        lower = image.convert("L").crop((0, 480, 1560, 960))
        assert len(lower.getcolors()) > 50


@pytest.mark.parametrize("image", [None, CODES], ids=["latents", "codes"])
def test_a_question_about_what_was_drawn_is_answered(image):
    """Two conversations in which the assistant has drawn, one twice: answers are those of whole passes, token by
    token.
    """
    model, processor = tiny_artist(image=image), artist_processor(image)
    rows = []
    for count in (1, 2):
        drawn = [{"type": "image", "image": picture(32, 32, seed)} for seed in range(count)]
        said = [{"role": "user", "content": "draw"}, {"role": "assistant", "content": drawn}]
        encoded = processor.encode_chat([*said, {"role": "user", "content": "what?"}], add_generation_prompt=True)
        rows.append({"prompt_ids": encoded["input_ids"].tolist(), "media": encoded["media"]})
    answers = AnswerGenerator(processor, 3).write(model, rows, 2)
    for found, example in zip(answers, rows, strict=True):
        ids, media = torch.tensor([example["prompt_ids"]]), processor.collate_media(example["media"])
        for _ in range(3):
            with torch.no_grad():
                logits = model(input_ids=ids, **media, num_steps=2).logits[0, -1]
            logits[model.placeholder_ids] = -torch.inf
            ids = torch.cat((ids, logits.argmax().view(1, 1)), dim=1)
        new = ids[0, len(example["prompt_ids"]) :]
        assert found == processor.tokenizer.decode(new, skip_special_tokens=True).strip()
