"""Word problems of groups of permutations: the product of a sequence of elements, each of which is one token.

A5 is the smallest group that is not solvable. Its word problem is complete for NC1 (Barrington 1989), so that no
circuit of constant depth and polynomial size is known to solve it, nor a transformer whose depth does not grow with the
sequence: Liu et al. 2023, arXiv 2210.10749; Merrill et al. 2024, arXiv 2404.08819.
"""

import random
from itertools import combinations, permutations
from string import ascii_letters, digits

from .base import GeneratedTask

Permutation = tuple[int, ...]
IDENTITY = (0, 1, 2, 3, 4)
S5 = list(permutations(IDENTITY))
A5 = [it for it in S5 if sum(it[one] > it[other] for one, other in combinations(IDENTITY, 2)) % 2 == 0]
BYTES = (ascii_letters + digits)[: len(A5)]
"""An ASCII character for each element of A5, which is a token of every vocabulary of bytes."""
# Letters of two bytes, from À on.
WORDS = [f" {chr(code)}" for code in range(0xC0, 0x17F) if chr(code).isalpha()][: len(S5)]
"""A blank and a letter for each element of S5. Each is a word, and so a token of a vocabulary of 382 that is trained on
them: 259, two for the blank with either first byte, 120, and one for the blank with "="."""


class WordProblem(GeneratedTask):
    """Multiply `difficulty` elements that are drawn evenly; the first one acts first.

    Roles share no sequence, but a sequence may be the beginning of one in another role, and of a single element there
    are few.
    """

    default_difficulty = (1, 20)
    symbols: dict[str, Permutation]
    """The permutation p of each symbol, which brings the thing at place k to place p[k]."""
    end: str
    """Text behind the elements; "" where the answer has the product up to each element, and not that of all alone."""

    def sample(self, rng: random.Random, difficulty: int) -> dict[str, str]:
        chosen, products = rng.choices(list(self.symbols), k=difficulty), [IDENTITY]
        for symbol in chosen:
            products.append(tuple(self.symbols[symbol][place] for place in products[-1]))
        written = {element: symbol for symbol, element in self.symbols.items()}
        answer = products[-1:] if self.end else products[1:]
        return {"prompt": "".join(chosen) + self.end, "answer": "".join(written[it] for it in answer)}

    def check(self, prompt: str, answer: str) -> bool:
        """Backwards: whether undoing the elements, the last one first, leads from the answer to the identity, by way of
        the products that the answer has in front of its last one.
        """
        elements, products = self._read(prompt.removesuffix(self.end)), self._read(answer)
        if not elements or len(products) != (1 if self.end else len(elements)):
            return False
        state = products[-1]
        while elements:
            if products and products.pop() != state:
                return False
            element = elements.pop()
            state = tuple(element.index(place) for place in state)
        return state == IDENTITY

    def _read(self, text: str) -> list[Permutation]:
        """The elements in a text; none where it has something else."""
        width = len(next(iter(self.symbols)))
        symbols = [text[start : start + width] for start in range(0, len(text), width)]
        return [self.symbols[it] for it in symbols] if set(symbols) <= set(self.symbols) else []


class A5Word(WordProblem):
    """The product of elements of A5, in `BYTES`."""

    name = "a5_word"
    symbols = dict(zip(BYTES, A5, strict=True))
    end = "="


class A5Prefixes(A5Word):
    """The product up to each element, for `loss_on: tags`."""

    name = "a5_prefixes"
    end = ""


class S5Word(WordProblem):
    """The product of elements of S5, in `WORDS`."""

    name = "s5_word"
    symbols = dict(zip(WORDS, S5, strict=True))
    end = " ="


class S5Prefixes(S5Word):
    """The product up to each element, for `loss_on: tags`."""

    name = "s5_prefixes"
    end = ""
