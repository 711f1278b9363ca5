"""The sequence-to-sequence model: what its decoder sees of the source and of itself, with and without a cache."""

import textwrap

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

from model import MegaTransformerForSeq2SeqLM, MegaTransformerSeq2SeqModel, RecurrentCache
from tests.processes import run_python
from tests.tiny import BEGIN, PAD, tiny_ids
from tests.tiny_seq2seq import tiny_seq2seq, tiny_seq2seq_config

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
VARIANTS = {
    "both": {},
    "plain": {"encoder": {"num_core_layers": 0}, "decoder": {"num_core_layers": 0}},
    "encoder": {"decoder": {"num_core_layers": 0}},
    "decoder": {"encoder": {"num_core_layers": 0}},
    "pre": {"encoder": {"norm_placement": "pre"}, "decoder": {"norm_placement": "pre", "qk_norm": True}},
    "alibi": {"encoder": {"position_embedding": "alibi"}, "decoder": {"position_embedding": "alibi", "qk_bias": True}},
    "shared": {"decoder": {"num_core_layers": 4, "num_unique_core_layers": 2}},
    "widths": {
        "encoder": {"hidden_size": 48, "num_core_layers": 1},
        "tie_word_embeddings": False,
        "decoder": {"attn_logit_softcapping": 20.0},
    },
}


@pytest.fixture(params=VARIANTS)
def model(request) -> MegaTransformerForSeq2SeqLM:
    return tiny_seq2seq(**VARIANTS[request.param])


def masked(lengths: list[int], longest: int, is_left: bool = False) -> torch.Tensor:
    """(rows, longest) with 1 for real tokens."""
    places = torch.arange(longest)
    places = places.flip(0) if is_left else places
    return (places[None] < torch.tensor(lengths)[:, None]).long()


def step_by_step(model, source, mask, target, target_mask, cache, **options):
    """Logits of the targets, read one by one into a cache."""
    found = []
    for place in range(target.shape[1]):
        out = model(
            source,
            mask,
            target[:, place : place + 1],
            target_mask[:, : place + 1],
            cache=cache,
            use_cache=True,
            **options,
        )
        found.append(out.logits)
    return torch.cat(found, dim=1)


@torch.no_grad()
def test_cached_is_uncached(model):
    """Token by token, with padding at either end, rows of several depths, and the source read once."""
    source, target = tiny_ids(3, 7), tiny_ids(3, 6, seed=1)
    mask, target_mask = masked([7, 4, 6], 7), masked([6, 5, 3], 6, is_left=True)
    depth = {"num_steps": torch.tensor([4, 2, 3])} if model.text_config.num_core_layers else {}
    cache = RecurrentCache(model.text_config)
    whole = model(source, mask, target, target_mask, **depth).logits
    found = step_by_step(model, source, mask, target, target_mask, cache, **depth)
    real = target_mask.bool()
    torch.testing.assert_close(found[real], whole[real], **CLOSE)
    # Behind the first token the source is that of the cache.
    after = model(tiny_ids(3, 7, seed=5), mask, tiny_ids(3, 1), cache=cache, **depth).logits
    cache.crop(-1)
    torch.testing.assert_close(model(source, mask, tiny_ids(3, 1), cache=cache, **depth).logits, after)


@torch.no_grad()
def test_padding_changes_nothing(model):
    """A row alone, without padding in source and target, has the logits that it has in a batch."""
    source, target = tiny_ids(2, 7), tiny_ids(2, 6, seed=1)
    mask, target_mask = masked([7, 4], 7), masked([4, 6], 6)
    found = model(source, mask, target, target_mask)
    for row, (before, behind) in enumerate(((7, 4), (4, 6))):
        alone = model(source[row : row + 1, :before], None, target[row : row + 1, :behind])
        torch.testing.assert_close(found.logits[row, :behind], alone.logits[0], **CLOSE)
        states = found.encoder_last_hidden_state[row, :before]
        torch.testing.assert_close(states, alone.encoder_last_hidden_state[0], **CLOSE)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(model(source, None, target, target_mask).logits, found.logits, **CLOSE)


def test_what_is_predicted_is_not_seen(model):
    """Label i depends on all of the source, on what the decoder reads until place i, and on nothing behind it."""
    embed = model.model.embed_tokens
    source = model.model.encoder.embed_tokens(tiny_ids(1, 5)).detach().requires_grad_()
    target = embed(tiny_ids(1, 6, seed=1)).detach().requires_grad_()
    logits = model(inputs_embeds=source, decoder_inputs_embeds=target).logits
    for place in range(6):
        of_source, of_target = torch.autograd.grad(logits[0, place].square().sum(), (source, target), retain_graph=True)
        assert (of_source[0].abs().amax(-1) > 0).all()
        assert (of_target[0].abs().amax(-1) > 0).tolist() == [other <= place for other in range(6)]


def test_loss_is_the_mean_over_labels_and_reads_the_shifted_target(model):
    source, labels = tiny_ids(2, 5), tiny_ids(2, 6, seed=1)
    labels[0, 4:] = -100
    read = torch.tensor([[BEGIN, *labels[0, :4], PAD], [BEGIN, *labels[1, :5]]])
    out = model(source, labels=labels)
    logits = model(source, decoder_input_ids=read).logits
    real = labels != -100
    expected = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)[real].mean()
    torch.testing.assert_close(out.loss, expected)
    in_chunks = model(source, labels=labels, skip_logits=True)
    torch.testing.assert_close(in_chunks.loss, expected)
    assert in_chunks.logits is None
    torch.testing.assert_close(model(source, labels=labels, num_items_in_batch=5).loss, expected * 10 / 5)


def test_every_parameter_learns(model):
    model.train()
    model(tiny_ids(2, 5), labels=tiny_ids(2, 6, seed=1)).loss.backward()
    assert [name for name, it in model.named_parameters() if it.grad is None or not it.grad.any()] == []


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}])
def test_generate_is_forward(options):
    """The tokens and scores are those of a pass over the whole target, without a cache."""
    model = tiny_seq2seq()
    source, mask = tiny_ids(2, 7), masked([7, 4], 7)
    options = {**options, "attention_mask": mask, "num_steps": 3, "encoder_num_steps": 2, "max_new_tokens": 6}
    torch.manual_seed(0)
    found = model.generate(source, **options, return_dict_in_generate=True, output_logits=True, output_scores=True)
    torch.manual_seed(0)
    assert torch.equal(model.generate(source, **options, use_cache=False), found.sequences)
    read = found.sequences[:, :-1]
    assert (read[:, 0] == BEGIN).all()
    logits = model(source, mask, read, num_steps=3, encoder_num_steps=2).logits.log_softmax(-1)
    if "num_beams" in options:
        new = found.sequences[:, 1:]
        scores = logits.gather(-1, new[..., None]).squeeze(-1)
        ended = (new == model.config.eos_token_id).cumsum(-1)
        counted = (ended == 0) | ((new == model.config.eos_token_id) & (ended == 1))
        expected = (scores * counted).sum(-1) / counted.sum(-1)
        torch.testing.assert_close(found.sequences_scores, expected, **CLOSE)
    else:
        torch.testing.assert_close(torch.stack(found.logits, 1).log_softmax(-1), logits, **CLOSE)


@torch.no_grad()
def test_a_row_that_exits_is_the_row_alone():
    """Its tokens are those of a pass in which it has as many steps for each; the encoder takes all of its own."""
    model = tiny_seq2seq()
    source, mask = tiny_ids(3, 7), masked([7, 4, 6], 7)
    exits = {"num_steps": 8, "exit_criterion": "kl_divergence", "exit_threshold": 0.2, "exit_in_prefill": True}
    options = {**exits, "max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    found = model.generate(source, attention_mask=mask, **options, output_logits=True)
    assert found.exit_steps.shape == (3, 5) and len(found.exit_steps.unique()) > 1
    for row, length in enumerate((7, 4, 6)):
        cache = RecurrentCache(model.text_config)
        for place in range(5):
            given = {"cache": cache, "use_cache": True, "num_steps": int(found.exit_steps[row, place])}
            read = found.sequences[row : row + 1, place : place + 1]
            alone = model(source[row : row + 1, :length], None, read, **given).logits[0, -1]
            torch.testing.assert_close(found.logits[place][row], alone, **CLOSE)


@torch.no_grad()
def test_steps_without_gradient_count_in_both_parts():
    model = tiny_seq2seq()
    given = {"input_ids": tiny_ids(2, 5), "labels": tiny_ids(2, 6, seed=1)}
    pairs = model(**given, num_steps=(2, 3), encoder_num_steps=(1, 2)).logits
    torch.testing.assert_close(model(**given, num_steps=5, encoder_num_steps=3).logits, pairs)
    for other in ({"num_steps": 5}, {"num_steps": 4, "encoder_num_steps": 3}):
        steps = {"encoder_num_steps": 2, **other}
        assert not torch.allclose(model(**given, **steps).logits, pairs, atol=1e-3)


def test_encoder_outputs_take_the_place_of_the_source():
    model = tiny_seq2seq()
    source, read, mask = tiny_ids(2, 7), tiny_ids(2, 3, seed=1), masked([7, 4], 7)
    encoded = model.get_encoder()(source, mask, use_cache=False)
    expected = model(source, mask, read).logits
    assert torch.equal(model(None, mask, read, encoder_outputs=encoded).logits, expected)
    assert torch.equal(model(None, mask, read, encoder_outputs=(encoded.last_hidden_state,)).logits, expected)
    base = model.model(source, mask, read)
    assert isinstance(model.model, MegaTransformerSeq2SeqModel)
    assert torch.equal(model.compute_logits(base.last_hidden_state), expected)


@torch.no_grad()
def test_attentions_and_hidden_states_of_all_parts():
    """Probabilities of the source sum to 1 over real tokens, for each executed layer."""
    model = tiny_seq2seq()
    out = model(tiny_ids(2, 7), masked([7, 4], 7), tiny_ids(2, 3), output_attentions=True, output_hidden_states=True)
    assert len(out.cross_attentions) == len(out.decoder_attentions) == 1 + 4 * 2 + 1
    assert len(out.encoder_attentions) == 1 + 3 * 2 + 1
    assert len(out.decoder_hidden_states) == 1 + 1 + 4 + 1
    for attentions in out.cross_attentions:
        assert attentions.shape == (2, 4, 3, 7) and not attentions[1, :, :, 4:].any()
        torch.testing.assert_close(attentions.sum(-1), torch.ones(2, 4, 3))
    assert out.encoder_attentions[0][0, 0].triu(1).any()  # it sees what is behind


@torch.no_grad()
def test_backends_agree():
    model = tiny_seq2seq()
    given = (tiny_ids(2, 7), masked([7, 4], 7), tiny_ids(2, 3, seed=1))
    expected = model(*given).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(*given).logits, expected, **CLOSE)
    with pytest.raises(ValueError, match="cross-attention is not possible with flex_attention; use sdpa or eager"):
        model.set_attn_implementation("flex_attention")


def test_checkpointing_changes_no_gradient():
    found = []
    for is_on in (False, True):
        model = tiny_seq2seq().train()
        if is_on:
            model.gradient_checkpointing_enable()
        model(tiny_ids(2, 5), labels=tiny_ids(2, 6, seed=1), num_steps=(1, 2), use_cache=False).loss.backward()
        found.append({name: it.grad for name, it in model.named_parameters()})
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])
    with pytest.raises(ValueError, match="use_reentrant is true, but layers share"):
        model.activation_checkpointing_enable({"use_reentrant": True})


def test_three_matrices_are_one(tmp_path):
    """One storage, one gradient, also after saving and loading; untied there are three."""
    model = tiny_seq2seq()
    model.save_pretrained(tmp_path)
    for each in (model, MegaTransformerForSeq2SeqLM.from_pretrained(tmp_path)):
        weights = [each.lm_head.weight, each.model.embed_tokens.weight, each.model.encoder.embed_tokens.weight]
        assert len({it.data_ptr() for it in weights}) == 1
    untied = tiny_seq2seq(tie_word_embeddings=False)
    names = {"lm_head.weight", "model.embed_tokens.weight", "model.encoder.embed_tokens.weight"}
    assert names <= dict(untied.named_parameters()).keys()
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base.encoder.embed_tokens.weight, model.lm_head.weight)


def test_a_checkpoint_runs_elsewhere(tmp_path):
    """With the code that was saved beside it, in a process that has no other."""
    model = tiny_seq2seq()
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved")
    assert type(AutoConfig.from_pretrained(tmp_path / "saved")) is type(loaded.config) is type(model.config)
    expected = model.generate(tiny_ids(2, 7), max_new_tokens=5, do_sample=False)
    assert torch.equal(loaded.eval().generate(tiny_ids(2, 7), max_new_tokens=5, do_sample=False), expected)
    code = f"""
        import torch
        from transformers import AutoModelForSeq2SeqLM
        model = AutoModelForSeq2SeqLM.from_pretrained({str(tmp_path / "saved")!r}, trust_remote_code=True).eval()
        ids = torch.tensor({tiny_ids(2, 7).tolist()})
        print(model.generate(ids, max_new_tokens=5, do_sample=False).tolist())
    """
    done = run_python("-c", textwrap.dedent(code), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(expected.tolist()) in done.stdout


def test_lora_learns_in_all_parts():
    model = tiny_seq2seq()
    tuned = get_peft_model(
        model, LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q_proj", "kv_proj", "qkv_proj"])
    )
    tuned(input_ids=tiny_ids(2, 5), labels=tiny_ids(2, 6, seed=1)).loss.backward()
    learned = [name for name, it in tuned.named_parameters() if it.requires_grad and it.grad is not None]
    assert {"encoder", "cross_attention"} <= {part for name in learned for part in name.split(".")}
    assert tuned.generate(input_ids=tiny_ids(2, 5), max_new_tokens=3).shape[0] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"encoder": {"hidden_size": 48}},
            "hidden_size is 48 in encoder_config and 32 in decoder_config; make them eq",
        ),
        (
            {"decoder": {"embedding_scale": 1.0}},
            "embedding_scale is 5.65.* in encoder_config and 1.0 in decoder_config",
        ),
        ({"vocab_size": 0}, "vocab_size"),
        (
            {"decoder": {"residual": "admin", "norm_placement": "post"}},
            "decoder_config.residual is 'admin', whose profiling pass is for text models; take another",
        ),
        ({"num_beams": 3}, "unknown key 'num_beams'"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_seq2seq_config(**options)


@pytest.mark.parametrize("options", [{"prefill_chunk_size": 2}, {"guidance_scale": 1.5}, {"assistant_model": True}])
def test_what_reads_the_prompt_of_a_decoder_is_refused(options):
    if "assistant_model" in options:
        options = {"assistant_model": tiny_seq2seq(seed=1)}
    with pytest.raises(ValueError, match="is not possible behind an encoder, which has the prompt"):
        tiny_seq2seq().generate(tiny_ids(1, 6), max_new_tokens=4, **options)


def test_a_target_needs_a_beginning():
    model = tiny_seq2seq(bos_token_id=None)
    with pytest.raises(ValueError, match="are null; give the token that begins a target"):
        model(tiny_ids(1, 3), labels=tiny_ids(1, 3))
    with pytest.raises(ValueError, match="does not know the argument 'encoder_steps'; did you mean"):
        model(tiny_ids(1, 3), decoder_input_ids=tiny_ids(1, 3), encoder_steps=3)
