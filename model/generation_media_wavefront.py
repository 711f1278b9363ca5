"""`generate(decoding="wavefront")` of one image or audio for each row: latents are items of the scheduler, and may be
drafts. A latent is drafted off a state that has not taken all steps, with the noise of the final one, and is kept where
it is within a tolerance of that; so what is generated is not quite what plain decoding would.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .generation_wavefront import after_wavefront, first_tokens, run_waves, text_rows
from .scheduler import Item, Scheduler, TextRow


@dataclass(eq=False)
class Position:
    """What is read at a position of an item: its token and, where that is a placeholder, its latent, (latent_size,)."""

    token: int
    latent: torch.Tensor | None = None


class MediaWavefront:
    """One call of `generate`: rows of the cache, and the positions that are final.

    Args:
        run: A `MediaGeneration` of mode "image" or "audio", whose rows are told what is final.
        draft_steps: Steps after which a position says a draft of the next; "auto": what takes the least time.
        streamer: Gets final tokens.

    Raises:
        ValueError: guidance or exits are asked for.
    """

    def __init__(self, run: Any, draft_steps: int | str, streamer: Any = None):
        if run.is_guided or run.depth.exits.criterion != "none":
            what = "guidance; give guidance_scale=1" if run.is_guided else "an exit_criterion"
            raise ValueError(f"decoding 'wavefront' of media is not possible with {what}, or use decoding='plain'")
        self.run, self.draft_steps, self.streamer = run, draft_steps, streamer
        (self.name,) = run.names
        self.output_head, self.tolerance = run.writers[self.name], run.media_options.latent_tolerance
        self.place_id, self.end_id = run.media_token_ids(self.name)

    def generate(self) -> None:
        """Positions until no row goes on; the run has them then."""
        run = self.run
        ids, _ = run.choose(run.read_prompt())
        self.tokens, self.steps = [[token] for token in ids.tolist()], [[] for _ in run.rows]
        self._open_rows()
        run_waves(self.scheduler, self.draft_steps, lambda: max(map(len, self.tokens)))
        run.take_positions(self.tokens, self.steps)
        run.cache = after_wavefront(run.cache, [row.num_steps for row in self.rows], self.steps)

    def _open_rows(self) -> None:
        run, past = self.run, self.run.cache.get_seq_length()
        last = past - run.prompt_length + run.generation_config.max_length - 2
        steps, state = run.num_steps(len(run.rows)), run.inputs.get("initial_state")
        self.rows = text_rows(run.model, run.cache, first_tokens(run.mask), last, steps, state, run.depth.exits)
        self.scheduler = MediaScheduler(self)
        for row, media_row, tokens in zip(self.rows, run.rows, self.tokens, strict=True):
            self._stream(tokens[0])
            self.steps[row.index].append(row.num_steps)
            if not media_row.is_done and row.last_place >= past:
                latent = media_row.latents[-1] if tokens[0] == self.place_id else None
                self.scheduler.open(row, past, [Position(tokens[0], latent)])

    def _stream(self, token: int) -> None:
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token]))

    # ------------------------------------------------------------------------------------------ what the scheduler asks

    def embeds(self, positions: Sequence[Position]) -> torch.Tensor:
        """Embeddings of positions, (positions, hidden)."""
        model = self.run.model.model
        ids = torch.tensor([position.token for position in positions], device=self.run.device)
        embeds = model.embed_tokens(ids)
        places = [number for number, position in enumerate(positions) if position.latent is not None]
        if places:
            latents = torch.stack([positions[number].latent for number in places])
            index = torch.tensor(places, device=ids.device)
            embeds = embeds.index_copy(0, index, self.output_head.embed(latents).to(embeds))
        return embeds

    def choose(self, items: Sequence[Item], hidden: torch.Tensor, logits: torch.Tensor) -> list[Position]:
        """The position that each item says, behind the drafts before it; hidden: (items, hidden), after the coda."""
        rows = [self.run.rows[item.row.index] for item in items]
        counts = [
            len(row.latents) + sum(draft.latent is not None for draft in item.drafts)
            for item, row in zip(items, rows, strict=True)
        ]
        goes_on = logits[:, self.place_id] >= logits[:, self.end_id]
        may_end = [self.name == "audio" and count > 0 for count in counts]
        is_place = [
            count < len(row.noise) and (on or not free)
            for count, row, on, free in zip(counts, rows, goes_on.tolist(), may_end, strict=True)
        ]
        chosen = [Position(self.end_id) for _ in items]
        numbers = [number for number, place in enumerate(is_place) if place]
        if numbers:
            positions = torch.tensor([counts[number] for number in numbers], device=self.run.device)
            noise = torch.stack([rows[number].noise[counts[number]] for number in numbers]).to(self.run.device)
            conditional = hidden[torch.tensor(numbers, device=self.run.device)]
            latents = self.run.draw_latents(self.name, positions, noise, conditional)
            for number, latent in zip(numbers, latents, strict=True):
                chosen[number] = Position(self.place_id, latent)
        return chosen

    def holds(self, draft: Position, choice: Position) -> bool:
        """Whether a draft is as good as what is said now."""
        if draft.token != choice.token or draft.latent is None:
            return draft.token == choice.token
        return bool((draft.latent - choice.latent).norm() <= self.tolerance * choice.latent.norm())

    def accept(self, row: TextRow, position: Position, steps: int) -> bool:
        """Tells a row what is final; whether it goes on."""
        number = row.index
        self.tokens[number].append(position.token)
        self.steps[number].append(steps)
        self._stream(position.token)
        return self.run.take_position(number, position.latent, len(self.tokens[number]))


class MediaScheduler(Scheduler):
    """The scheduler of items that read positions.

    Args:
        wave: What says and takes them.
    """

    def __init__(self, wave: MediaWavefront):
        super().__init__(wave.run.model, wave.run.cache, None, wave.accept)
        self.wave = wave

    def _embeds(self, items: Sequence[Item]) -> torch.Tensor:
        return self.wave.embeds([item.token for item in items])

    def _choices(self, items: Sequence[Item], hidden: torch.Tensor, logits: torch.Tensor) -> list[Position]:
        return self.wave.choose(items, hidden, logits)

    def _holds(self, draft: Position, choice: Position) -> bool:
        return self.wave.holds(draft, choice)

    def _may_draft(self, last: Item) -> bool:
        """Nothing follows the end."""
        ends = last.choice is not None and last.choice.latent is None
        return super()._may_draft(last) and not ends
