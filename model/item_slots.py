"""Where items (row, place, step) stand in a cache: they are the batch of a launch, and each has one new token."""

from collections.abc import Sequence
from itertools import pairwise

import torch

from .cache import CacheLayer


class ItemPlaces:
    """The rows, places and steps of items in the buffers of a cache, (steps, 2, rows, key/value heads, capacity,
    head_dim). Items of one row come the newest first, so that places fall by one from each to the next.

    Args:
        rows, places, steps: Those of each item; steps are 0 where a layer has one slot.
        starts: The first place of each that is no padding.
        device: That of the buffers.
    """

    def __init__(
        self,
        rows: Sequence[int],
        places: Sequence[int],
        steps: Sequence[int],
        starts: Sequence[int],
        device: torch.device,
    ):
        self.rows, self.places, self.steps, self.starts, self.device = rows, places, steps, starts, device
        self.end = max(places) + 1
        self.has_one_row = len(set(rows)) == 1
        self.start = starts[0] if self.has_one_row else 0
        self.stride = self._stride()
        in_order = all(later == row + 1 for row, later in pairwise(rows))
        self.is_in_phase = in_order and len(set(steps)) == 1
        """Whether there is one item of each of some rows that lie together, all at the same step."""
        self._index: tuple[torch.Tensor, ...] | None = None

    def _stride(self) -> int | None:
        """Steps between an item and the next, where all items are of one row and these are always as many, as in a
        wave. None: entries are gathered.
        """
        if not self.has_one_row or any(a != b + 1 for a, b in pairwise(self.places)):
            return None
        strides = {later - step for step, later in pairwise(self.steps)} or {0}
        return strides.pop() if len(strides) == 1 and min(strides) >= 0 else None

    @property
    def index(self) -> tuple[torch.Tensor, ...]:
        """Steps, rows and places, (items,) each."""
        if self._index is None:
            self._index = torch.tensor([self.steps, self.rows, self.places], device=self.device).unbind()
        return self._index

    def mask(self, table: torch.Tensor) -> torch.Tensor | None:
        """What is added to the logits of attention, (items, 1, 1, keys): items see their row up to themselves. None:
        a single item sees all that it is given. `table`: that of `causal_rows`.
        """
        count, last = len(self.rows), len(table) - 1
        if count == 1:
            return None
        table = table.narrow(1, self.start, self.end - self.start)
        if self.stride is not None:
            return table.narrow(0, last - self.places[0], count)[:, None, None]
        mask = table.index_select(0, last - self.index[2])
        if not self.has_one_row and any(self.starts):
            keys = torch.arange(self.end, device=self.device)
            mask.masked_fill_(keys < torch.tensor(self.starts, device=self.device)[:, None], -torch.inf)
        return mask[:, None, None]


def causal_rows(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Masks of so many places, the last place's first, (places, places): 0, and -inf behind each. Since each is the one
    before, moved by one, it is a view of two rows.
    """
    line = torch.zeros(2 * count - 1, dtype=dtype, device=device)
    line[count:] = -torch.inf
    return line.as_strided((count, count), (1, 1))


class ItemSlot:
    """Keys and values of items in one layer."""

    def __init__(self, layer: CacheLayer, items: ItemPlaces):
        self.buffer, self.items = layer.buffer, items

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`update_token` of (items, key/value heads, 1, head_dim) each."""
        return self.update_token(torch.stack((key_states, value_states), dim=1).squeeze(3))

    def update_token(self, both: torch.Tensor, *args: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values of the items, (items, 2, key/value heads, head_dim), all before any is read, and
        returns those that each may see, (items, key/value heads, keys, head_dim) each.
        """
        both, items = both.to(self.buffer.dtype), self.items
        if items.is_in_phase:
            return self._of_rows(both)
        if items.stride is None:
            return self._gathered(both)
        found = self._of_wave(both, items.stride)
        return found[:, 0], found[:, 1]

    def _gathered(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of items anywhere, as copies; one index gathers several times as fast as one for each dimension."""
        items, count, num_rows = self.items, len(both), self.buffer.shape[2]
        (steps, rows, places), flat = items.index, self.buffer.view(-1, *self.buffer.shape[3:])
        keys = 2 * num_rows * steps + rows  # among (steps * 2 * rows); values are as many rows behind
        self.buffer[steps, :, rows, :, places] = both
        found = flat[:, :, items.start : items.end].index_select(0, torch.cat((keys, keys + num_rows)))
        return found[:count], found[count:]

    def _of_rows(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of one item of each of some rows, at the same step, as views."""
        items = self.items
        found = self.buffer[items.steps[0]].narrow(1, items.rows[0], len(both))
        if len(set(items.places)) == 1:
            found.select(3, items.places[0]).copy_(both.transpose(0, 1))
        else:
            _, rows, places = items.index
            found[:, rows - items.rows[0], :, places] = both
        found = found.narrow(3, items.start, items.end - items.start)
        return found[0], found[1]

    def _of_wave(self, both: torch.Tensor, stride: int) -> torch.Tensor:
        """Those of items of one row, whose steps rise by as much as places fall by one, as a view. What is written lies
        on a diagonal of steps and places.
        """
        items, buffer = self.items, self.buffer
        step, row, place, count = items.steps[0], items.rows[0], items.places[0], len(both)
        if stride == 0:
            found = buffer[step].select(1, row)
            found.narrow(2, place - count + 1, count).copy_(both.flip(0).permute(1, 2, 0, 3))
            return found.narrow(2, items.start, items.end - items.start).expand(count, -1, -1, -1, -1)
        of_step, of_part, of_row, of_head, of_place, of_feature = buffer.stride()
        first = buffer.storage_offset() + step * of_step + row * of_row + place * of_place
        strides = (stride * of_step - of_place, of_part, of_head, of_feature)
        buffer.as_strided(both.shape, strides, first).copy_(both)
        found = buffer[step : step + stride * (count - 1) + 1 : stride].select(2, row)
        return found.narrow(3, items.start, items.end - items.start)
