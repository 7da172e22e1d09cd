"""WordPiece: a vocabulary from a file, or learned from texts, and its tokenizer, as BERT's uncased models have it."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

PAD, UNKNOWN, START, END, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
#: first in a vocabulary that is learned; [PAD] is 0
SPECIAL = (PAD, UNKNOWN, START, END, MASK)
LONGEST = 100  # letters of a word; a longer one is unknown


class TextError(ValueError):
    """Texts, or a vocabulary, that cannot be used; says the file, and the line where there is one."""


class Vocabulary:
    """Pieces of words by number, and the tokenizer that cuts texts into them.

    Args:
        pieces: in their order; inside of words they begin with ##. [PAD], [UNK], [CLS], [SEP] and [MASK] are among
            them, anywhere, as in BERT's files.

    Raises TextError where one of these is missing, or a piece comes twice.
    """

    def __init__(self, pieces: Sequence[str], where: str = "vocabulary"):
        self.pieces = list(pieces)
        self.numbers = {piece: i for i, piece in enumerate(self.pieces)}
        if missing := [name for name in SPECIAL if name not in self.numbers]:
            raise TextError(f"{where}: {missing[0]} is missing, which every vocabulary of BERT has")
        if len(self.numbers) < len(self.pieces):
            twice = Counter(self.pieces).most_common(1)[0][0]
            raise TextError(f"{where}: the piece {twice!r} comes twice")
        self.pad, self.unknown, self.start, self.end, self.mask = (self.numbers[name] for name in SPECIAL)
        self.tokenizer = Tokenizer(models.WordPiece(self.numbers, unk_token=UNKNOWN, max_input_chars_per_word=LONGEST))
        self.tokenizer.normalizer, self.tokenizer.pre_tokenizer = _cleaning(), pre_tokenizers.BertPreTokenizer()

    @classmethod
    def read(cls, path: str | Path) -> Vocabulary:
        """A file with one piece a line, as BERT's vocab.txt."""
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise TextError(f"{path}: expected a vocabulary, one piece a line: {error}") from error
        return cls(lines, str(path))

    def write(self, path: str | Path) -> None:
        Path(path).write_text("".join(f"{piece}\n" for piece in self.pieces), encoding="utf-8")

    def __len__(self) -> int:
        return len(self.pieces)

    def __reduce__(self) -> tuple[type[Vocabulary], tuple[list[str]]]:
        return Vocabulary, (self.pieces,)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The numbers of each text's pieces, without [CLS] and [SEP]."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def tokens(self, numbers: Iterable[int]) -> list[str]:
        return [self.pieces[i] for i in numbers]


def _cleaning() -> normalizers.Normalizer:
    return normalizers.BertNormalizer(lowercase=True)


def learn_vocabulary(texts: Iterable[str], size: int) -> Vocabulary:
    """The ``size`` pieces with which texts become short: letters first, then the most frequent pair of pieces is made
    one, again and again, as tokenizers' WordPieceTrainer does. Of equally frequent pairs the first by the alphabet, so
    that the same texts give the same vocabulary, which that trainer does not promise.

    Raises TextError: no text, or ``size`` leaves no room for the letters.
    """
    words = _counted(texts)
    if not words:
        raise TextError("there is no text to learn a vocabulary from")
    cut = [[word[0], *(f"##{letter}" for letter in word[1:])] for word in words]
    counts = list(words.values())
    letters = sorted({piece for pieces in cut for piece in pieces})
    if size < len(SPECIAL) + len(letters):
        raise TextError(
            f"a vocabulary of {size} pieces has no room for the {len(letters)} letters of the texts and "
            f"{len(SPECIAL)} special pieces; ask for more"
        )
    found = [*SPECIAL, *letters]
    known, pairs = set(found), _Pairs(cut, counts)
    while len(found) < size and (pair := pairs.best()) is not None:
        merged = pair[0] + pair[1].removeprefix("##")
        pairs.merge(pair, merged)
        if merged not in known:
            known.add(merged)
            found.append(merged)
    return Vocabulary(found)


def _counted(texts: Iterable[str]) -> dict[str, int]:
    """How often each word stands in texts, by the alphabet."""
    clean, split = _cleaning(), pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in split.pre_tokenize_str(clean.normalize_str(text)) if len(word) <= LONGEST)
    return dict(sorted(words.items()))


class _Pairs:
    """How often each pair of neighbouring pieces stands in words, kept while pairs are merged."""

    def __init__(self, words: list[list[str]], counts: list[int]):
        self.words, self.counts = words, counts
        self.often: Counter[tuple[str, str]] = Counter()
        self.where: dict[tuple[str, str], set[int]] = {}
        for i, pieces in enumerate(words):
            self._add(i, pieces, 1)
        self.heap = [(-n, pair) for pair, n in self.often.items()]
        heapq.heapify(self.heap)

    def _add(self, i: int, pieces: list[str], sign: int) -> set[tuple[str, str]]:
        pairs = set()
        for pair in pairwise(pieces):
            self.often[pair] += sign * self.counts[i]
            if sign > 0:
                self.where.setdefault(pair, set()).add(i)
            pairs.add(pair)
        return pairs

    def best(self) -> tuple[str, str] | None:
        """The most frequent pair; old entries of the heap are dropped as they come up."""
        while self.heap:
            n, pair = self.heap[0]
            if self.often[pair] == -n and n < 0:
                return pair
            heapq.heappop(self.heap)
        return None

    def merge(self, pair: tuple[str, str], merged: str) -> None:
        changed: set[tuple[str, str]] = set()
        for i in self.where.pop(pair, set()):
            old = self.words[i]
            new, at = [], 0
            while at < len(old):
                both = tuple(old[at : at + 2]) == pair
                new.append(merged if both else old[at])
                at += 2 if both else 1
            if len(new) < len(old):
                changed |= self._add(i, old, -1) | self._add(i, new, 1)
                self.words[i] = new
        for one in changed:
            heapq.heappush(self.heap, (-self.often[one], one))
