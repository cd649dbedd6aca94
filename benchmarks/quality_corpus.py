"""What ``retrofit_quality.py`` trains and measures on: installed Python packages as tokens, and rows of them.

Reading and encoding are spread over all cores; text goes by files, so that one large package is no worker's alone.
"""

import multiprocessing
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from long_context_probes import Prober
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset

from training.documents import Package, find_packages, installed_packages, standard_library


SAMPLE_BYTES = 15_000_000  # that the tokenizer learns from
BYTES_AT_ONCE = 500_000  # that a worker encodes at once
END = 0  # the token after each package


def build_corpus(folder: Path, most_bytes: int, vocabulary: int) -> None:
    """Write ``tokenizer.json``, and for ``train`` and ``held_out`` all tokens (``.npy``) and the packages' ends."""
    packages = {"train": _packages(False, most_bytes), "held_out": _packages(True, most_bytes // 8)}
    # Forked, and nothing of the tokenizer runs in this process: its threads would not survive in later forks.
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        tokenizer = folder / "tokenizer.json"
        pool.apply(_train_tokenizer, (packages["train"], vocabulary, tokenizer))
        for name, found in packages.items():
            stretches = [(i, package, files) for i, package in enumerate(found) for files in _stretches(package)]
            documents = [[] for _ in found]
            encoded = pool.imap(_encode, ((tokenizer, package, files) for _, package, files in stretches), 4)
            for (i, _, _), tokens in zip(stretches, encoded):
                documents[i].append(tokens)
            end = np.array([END], dtype=np.uint16)
            documents = [np.concatenate([*parts, end]) for parts in documents]
            np.save(folder / f"{name}_ends.npy", np.cumsum([len(d) for d in documents]))
            part = folder / f"{name}.part.npy"
            np.save(part, np.concatenate(documents))
            part.replace(folder / f"{name}.npy")  # there only when it is whole: other processes look for it
            print(f"corpus: {name} has {sum(map(len, documents)):,} tokens in {len(documents)} packages", flush=True)


def _packages(held_out: bool, most_bytes: int) -> list[Package]:
    # Where torch lies, too: not everywhere is that where pip installs to.
    roots = dict.fromkeys([standard_library(), installed_packages(), Path(torch.__file__).parents[1]])
    found, size = [], 0
    for package in find_packages(list(roots), held_out):
        if size > most_bytes:
            break
        found.append(package)
        size += sum(path.stat().st_size for path in package.files)
    return found


def _stretches(package: Package) -> Iterator[list[Path]]:
    files, size = [], 0
    for path in package.files:
        files.append(path)
        size += path.stat().st_size
        if size > BYTES_AT_ONCE:
            yield files
            files, size = [], 0
    if files:
        yield files


def _train_tokenizer(packages: list[Package], vocabulary: int, target: Path) -> None:
    files = [(package, path) for package in packages for path in package.files]
    total = sum(path.stat().st_size for _, path in files)
    every = max(1, total // SAMPLE_BYTES)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((package.text(path) for package, path in files[::every]), trainer)
    tokenizer.save(str(target))


def _encode(work: tuple[Path, Package, list[Path]]) -> np.ndarray:
    tokenizer, package, files = work
    encode = load_tokenizer(tokenizer).encode
    return np.array([token for path in files for token in encode(package.text(path)).ids], dtype=np.uint16)


@cache
def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer, once per process."""
    return Tokenizer.from_file(str(path))


class Corpus:
    """The corpus of a folder; tokens stay on disk until they are asked for."""

    def __init__(self, folder: Path):
        self.folder = folder

    def encode(self, text: str) -> list[int]:
        """Turn a text into token ids."""
        return load_tokenizer(self.folder / "tokenizer.json").encode(text).ids

    @cache  # noqa: B019  (one corpus per process)
    def tokens(self, name: str) -> Tensor:
        """Return all tokens of ``train`` or ``held_out``, uint16."""
        return torch.from_numpy(np.load(self.folder / f"{name}.npy", mmap_mode="c"))

    @cache  # noqa: B019
    def pieces(self, length: int, count: int) -> Tensor:
        """Return held-out stretches ``[count, length]``, each of one package, from as many packages as possible.

        Raises:
            SystemExit: if no held-out package is long enough.
        """
        text, ends = self.tokens("held_out"), np.load(self.folder / "held_out_ends.npy").tolist()
        found = [
            (number, start)
            for first, end in zip([0, *ends[:-1]], ends)
            for number, start in enumerate(range(first, end - length + 1, length))
        ]
        if not found:
            raise SystemExit(f"error: no held-out package has {length} tokens")
        starts = [start for _, start in sorted(found)[:count]]  # every package's first piece, then every second one
        return torch.stack([text[start : start + length].long() for start in starts])


class TrainingRows(Dataset):
    """Batches by number: ``rows [batch, length]``, and ``answers``, bool, the tokens that answer a planted question.

    The same in every run and for every model; each is made when asked for, by whichever process.
    """

    def __init__(
        self, corpus: Corpus, seed: str, length: int, batch_tokens: int, probe_share: float, tokens_per_probe: int
    ):
        self.corpus, self.seed, self.length = corpus, seed, length
        self.batch = max(1, batch_tokens // length)
        self.probe_share, self.most_questions = probe_share, max(1, length // tokens_per_probe)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        text = self.corpus.tokens("train")
        generator = np.random.default_rng([*self.seed.encode(), step])
        prober = Prober(self.corpus.encode, text, int(generator.integers(2**31)))
        made: list[tuple[Tensor, Tensor]] = []
        for _ in range(self.batch):
            if generator.random() < self.probe_share:
                made.append(prober.training_row(self.length, int(generator.integers(1, self.most_questions + 1))))
            else:
                start = int(generator.integers(len(text) - self.length))
                row = text[start : start + self.length].long()
                made.append((row, torch.zeros_like(row, dtype=torch.bool)))
        rows, answers = zip(*made)
        return torch.stack(rows), torch.stack(answers)
