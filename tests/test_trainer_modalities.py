"""The trainer on rows of several modalities: weights over the accumulation window, losses of each, epochs, lengths."""

import json

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset, IterableDataset

from model.depth import sample_depth
from model.recurrence import draw_training_states
from tests.test_trainer import Interrupt, build, losses, rows
from tests.tiny import tiny_model
from tests.tiny_media import tiny_media_model
from trainers import ModalityWeights, RecurrentTrainingArguments, find_resume_point
from trainers.recurrent import LengthSampler

NAMES = ("text", "image", "audio")
WEIGHTS = ModalityWeights(image=2.0, audio=0.25)


def mixed_rows(count=32):
    """Row i is of modality i mod 3; its second half is text, as where documents are packed."""
    mixed = rows(count)
    for index, row in enumerate(mixed):
        row["modality_ids"] = torch.full_like(row["input_ids"], index % 3)
        row["modality_ids"][6:] = 0
    return mixed


def build_mixed(folder, dataset=None, **options):
    return build(folder, dataset=dataset or mixed_rows(), modality_weights=WEIGHTS, **options)


def label_losses(model, batch, depth, state):
    """Loss of each label and its modality, both flat, -100 left out; through `logits`."""
    logits = model(batch["input_ids"], num_steps=depth, initial_state=state).logits[:, :-1].flatten(0, 1)
    targets = batch["labels"][:, 1:].flatten()
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return nll[targets != -100], batch["modality_ids"][:, 1:].flatten()[targets != -100]


def windows(data, num_windows, micro_batches, model, seed):
    """`label_losses` of each window of `micro_batches` batches of 4 rows, with depths and states of the trainer."""
    for step in range(num_windows):
        parts = []
        for micro in range(micro_batches):
            first = 4 * (step * micro_batches + micro)
            batch = {name: torch.stack([row[name] for row in data[first : first + 4]]) for name in data[0]}
            state = draw_training_states(model.config, 12, [(seed, step, 4 * micro + row) for row in range(4)])
            parts.append(label_losses(model, batch, sample_depth(model.config.recurrence, seed, step, micro), state))
        yield tuple(torch.cat(part) for part in zip(*parts, strict=True))


def test_a_weighted_step_equals_ten_lines_by_hand(tmp_path):
    """The sum of weighted losses of both micro-batches, divided once by the weights of all their labels."""
    data = mixed_rows(8)
    trainer = build_mixed(
        tmp_path,
        dataset=data,
        max_steps=1,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        seed=3,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    model = tiny_model(seed=3).train()
    ((nll, modality),) = windows(data, 1, 2, model, seed=3)
    weights = torch.tensor([1.0, 2.0, 0.25])[modality]
    loss = (weights * nll).sum() / weights.sum()
    assert losses(trainer) == [pytest.approx(loss.item(), rel=1e-5)]
    loss.backward()
    for ours, by_hand in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, by_hand - 0.5 * by_hand.grad, atol=1e-6, rtol=1e-4)


def test_weighted_accumulation_equals_one_large_batch(tmp_path):
    """4 x 1 rows = 1 x 4 rows, though each row has weights of its own."""
    results = []
    for per_device, steps in ((4, 1), (1, 4)):
        model = tiny_model(recurrence={"step_distribution": "fixed"})
        trainer = build_mixed(
            tmp_path,
            model=model,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=steps,
            max_steps=3,
        )
        trainer.train()
        entry = trainer.state.log_history[2]
        results.append((losses(trainer), [entry[f"loss_{name}"] for name in NAMES], list(model.parameters())))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)
    for a, b in zip(results[0][2], results[1][2], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_losses_tokens_and_shares_are_logged_by_modality(tmp_path):
    """Over the two windows since the last log; losses are not weighted. Nothing is learned, so that they can be
    computed afterwards.
    """
    data = mixed_rows(32)
    trainer = build_mixed(
        tmp_path,
        dataset=data,
        max_steps=4,
        logging_steps=2,
        gradient_accumulation_steps=2,
        learning_rate=0.0,
        seed=3,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    with torch.no_grad():
        found = list(windows(data, 4, 2, trainer.model, seed=3))
    weights = torch.tensor([1.0, 2.0, 0.25])
    for entry, pair in zip(entries, (found[:2], found[2:]), strict=True):
        nll, modality = (torch.cat(part) for part in zip(*pair, strict=True))
        for number, name in enumerate(NAMES):
            chosen = modality == number
            assert entry[f"loss_{name}"] == pytest.approx(nll[chosen].mean().item(), rel=1e-5)
            assert entry[f"tokens_{name}"] == chosen.sum().item() / 2
            share = (weights[number] * chosen.sum() / weights[modality].sum()).item()
            assert entry[f"weight_share_{name}"] == pytest.approx(share, rel=1e-5)


def test_the_figures_are_those_of_all_ranks(tmp_path, monkeypatch):
    """As if three ranks had counted the same, and one more text token with loss 0."""
    trainer = build_mixed(tmp_path, max_steps=1)
    alone = build_mixed(tmp_path, max_steps=1)
    alone.train()

    def add_up(values, reduction):
        assert reduction == "sum"
        if values.ndim == 2:
            values = 3 * values
            values[0, 1] += 1
        return values

    monkeypatch.setattr(trainer.accelerator, "reduce", add_up)
    trainer.train()
    ours, one = (run.state.log_history[0] for run in (trainer, alone))
    assert ours["tokens_image"] == 3 * one["tokens_image"] and ours["tokens_text"] == 3 * one["tokens_text"] + 1
    assert ours["loss_image"] == pytest.approx(one["loss_image"])
    assert ours["loss_text"] == pytest.approx(3 * one["loss_text"] * one["tokens_text"] / ours["tokens_text"])


def test_a_modality_that_did_not_occur_is_not_logged(tmp_path):
    data = mixed_rows()
    for row in data:
        row["modality_ids"] = row["modality_ids"] // 2 * 2  # images become text
    trainer = build(tmp_path, dataset=data, max_steps=1, train_sampling_strategy="sequential")
    trainer.train()
    entry = trainer.state.log_history[0]
    assert {"loss_text", "loss_audio"} <= entry.keys() and not any("image" in key for key in entry)


def test_without_modalities_nothing_changes(tmp_path):
    """Weights of 1 change nothing where rows name modalities; where they name none, none is logged."""
    plain, mixed = build(tmp_path), build(tmp_path, dataset=mixed_rows())
    for run in (plain, mixed):
        run.train()
    assert losses(plain) == losses(mixed)
    added = set().union(*mixed.state.log_history) - set().union(*plain.state.log_history)
    assert added == {f"{kind}_{name}" for kind in ("loss", "tokens", "weight_share") for name in NAMES}


def test_evaluation_is_not_weighted(tmp_path):
    plain, weighted = build(tmp_path), build_mixed(tmp_path)
    weighted.eval_dataset = mixed_rows(8)
    assert weighted.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)


def test_a_window_of_no_weight_teaches_nothing(tmp_path):
    """And is no 0 / 0."""
    data = rows()
    for row in data:
        row["modality_ids"] = torch.ones_like(row["input_ids"])
    weights = ModalityWeights(image=0.0)
    model = tiny_model()
    before = [parameter.clone() for parameter in model.parameters()]
    trainer = build(tmp_path, model=model, dataset=data, modality_weights=weights, max_steps=2)
    trainer.train()
    assert losses(trainer) == [0, 0] and trainer.state.log_history[0]["loss_image"] > 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"image": -1.0}, "the weight of image is -1.0; give a finite number, at least 0"),
        ({"audio": float("inf")}, "the weight of audio is inf"),
        ({"text": float("nan")}, "the weight of text is nan"),
        ({"text": 0.0, "image": 0.0, "audio": 0.0}, "all weights are 0: nothing would be learned"),
    ],
)
def test_weights_that_are_none(weights, message):
    with pytest.raises(ValueError, match=message):
        ModalityWeights(**weights)


def test_the_arguments_are_plain_values_for_those_who_report_them(tmp_path):
    args = RecurrentTrainingArguments(str(tmp_path), modality_weights=WEIGHTS)
    assert json.loads(args.to_json_string())["modality_weights"] == {"text": 1.0, "image": 2.0, "audio": 0.25}


# Rows


class Recorder(Dataset):
    """Rows whose first token tells the epoch in which they were read; of growing length."""

    def __init__(self, count=16):
        self.lengths = [4 + index % 8 for index in range(count)]
        self.epoch, self.may_be_read = -1, False

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        assert self.may_be_read, "all rows are read before training"
        return {"input_ids": [self.epoch, index, *[5] * (self.lengths[index] - 2)], "media": {"image": [index]}}


def collate(seen):
    def pad(batch):
        seen.extend((row["input_ids"][0], row["input_ids"][1], *row["media"]["image"]) for row in batch)
        longest = max(len(row["input_ids"]) for row in batch)
        ids = torch.tensor([[*row["input_ids"], *[0] * (longest - len(row["input_ids"]))] for row in batch]).clamp(0)
        return {"input_ids": ids, "labels": ids, "modality_ids": torch.zeros_like(ids)}

    return pad


def train_recorded(folder, seen, interrupt=None, **options):
    trainer = build(folder, dataset=Recorder(), max_steps=12, **options)
    trainer.data_collator = collate(seen)
    trainer.train_dataset.may_be_read = True
    if interrupt is not None:
        trainer.add_callback(Interrupt(interrupt))
    trainer.train(resume_from_checkpoint=find_resume_point(trainer.args))
    return trainer


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_dataset_and_sampler_know_the_epoch(tmp_path, strategy):
    """Each epoch has its own order, and a run that is resumed within one reads the rest of it; media reach the
    collator.
    """
    whole, first, second = [], [], []
    train_recorded(tmp_path / "whole", whole, train_sampling_strategy=strategy)
    epochs, indices, media = zip(*whole, strict=True)
    assert epochs == (0,) * 16 + (1,) * 16 + (2,) * 16 and indices == media
    orders = [indices[start : start + 16] for start in (0, 16, 32)]
    assert len(set(orders)) == 3 and all(sorted(order) == list(range(16)) for order in orders)
    train_recorded(tmp_path / "cut", first, interrupt=6, train_sampling_strategy=strategy)
    train_recorded(tmp_path / "cut", second, resume_from_checkpoint="true", train_sampling_strategy=strategy)
    assert first[:24] == whole[:24] and second[-24:] == whole[24:]


@pytest.mark.parametrize("is_set_later", [False, True])
def test_dataset_and_sampler_of_several_ranks_know_the_epoch(tmp_path, is_set_later):
    """accelerate tells the one or the other. An epoch of 16 rows, 2 ranks, 2 rows and 2 batches has 2 updates."""
    trainer, dataset = build(tmp_path, dataset=Recorder(), gradient_accumulation_steps=2), Recorder(16)
    sampler = LengthSampler(4, dataset.lengths, seed=0)
    loader = DataLoader(dataset, batch_size=2, sampler=None if is_set_later else sampler)
    loader = prepare_data_loader(loader, num_processes=2, process_index=1)
    if is_set_later:
        loader.set_sampler(sampler)
    for step, epoch in [(0, 0), (6, 3), (7, 3), (8, 4)]:
        trainer.state.global_step = step
        trainer.callback_handler.train_dataloader = loader
        trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
        assert dataset.epoch == sampler.epoch == epoch
    order = list(sampler)
    assert list(loader.batch_sampler) == [order[start : start + 2] for start in (2, 6, 10, 14)]


def test_rows_of_similar_length_stand_together_and_none_is_read_to_know_it(tmp_path):
    def excess(strategy):
        seen = []
        trainer = build(tmp_path, dataset=Recorder(64), train_sampling_strategy=strategy)
        trainer.data_collator = collate(seen)
        loader = trainer.get_train_dataloader()
        trainer.train_dataset.may_be_read = True
        loader.set_epoch(0)
        lengths = [[len(row) for row in batch["input_ids"]] for batch in loader]
        assert len(lengths) == 16
        real = sum(trainer.train_dataset.lengths)
        return sum(sum(batch) for batch in lengths) / real

    assert excess("group_by_length") < 1.1 < 1.2 < excess("random")


def test_an_evaluation_groups_by_the_known_lengths_too(tmp_path):
    trainer = build(tmp_path, train_sampling_strategy="group_by_length", per_device_eval_batch_size=2)
    dataset = Recorder(16)
    dataset.may_be_read = True
    order = list(trainer.get_eval_dataloader(dataset).get_sampler())
    assert sorted(order) == list(range(16)) and order != sorted(order)
    assert trainer.args.train_sampling_strategy == "group_by_length"


class Stream(IterableDataset):
    """Rows whose media are not one for each."""

    def __iter__(self):
        for number in range(16):
            yield {"input_ids": [5, 6, 7, number + 10], "media": {"image": [number] * (number % 3)}}


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_stream_with_media_is_dealt_out_by_rows(tmp_path, monkeypatch, num_processes):
    """Each rank reads its rows, with all their media, and no more; accelerate would cut tensors of media like rows."""

    def join(rows):
        ids = torch.tensor([row["input_ids"] for row in rows])
        media = [number for row in rows for number in row["media"]["image"]]
        return {"input_ids": ids, "labels": ids, "pixel_values": torch.tensor(media, dtype=torch.float32)}

    model = tiny_media_model()
    trainer = build(tmp_path, model=model, dataset=Stream(), max_steps=1, per_device_train_batch_size=2)
    of_text = build(tmp_path, dataset=Stream())
    assert of_text.accelerator.dataloader_config.dispatch_batches is None
    trainer.data_collator = join
    loaders = []
    for rank in range(num_processes):
        monkeypatch.setattr(
            "accelerate.accelerator.prepare_data_loader",
            lambda *args, rank=rank, **options: prepare_data_loader(
                *args, **{**options, "num_processes": num_processes, "process_index": rank}
            ),
        )
        loaders.append(trainer.get_train_dataloader())
    seen = []
    for batches in zip(*loaders, strict=True):
        for batch in batches:
            numbers = (batch["input_ids"][:, -1] - 10).tolist()
            assert batch["pixel_values"].tolist() == [number for number in numbers for _ in range(number % 3)]
            seen += numbers
    assert seen == list(range(16))
