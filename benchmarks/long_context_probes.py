"""Small tasks whose answer stands far back in the text, in the manner of RULER (arXiv 2404.06654), for models of code.

Each is a stretch of real code with lines planted in it and a question at the end whose answer follows from them alone.
A model is right if each token of the answer is its most likely one, the tokens before it given.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor


HOPS = 3
CANDIDATES, VOTES_EACH, VOTES_OF_THE_WINNER = 4, 2, 7


@dataclass
class Probe:
    """Tokens ``[length]``, of which those from ``answer_start`` on are the answer."""

    tokens: Tensor
    answer_start: int


class Prober:
    """Plant probes into real text.

    Args:
        encode: turns a text into token ids.
        text: real tokens to plant in, one-dimensional.
        seed: of all random choices; equal seeds give equal probes.
    """

    def __init__(self, encode, text: Tensor, seed: int):
        self.encode = encode
        self.text = text
        self.random = random.Random(seed)

    def needle(self, length: int, depth: float) -> Probe:
        """One assignment at ``depth`` (0: the beginning, 1: the end); asked for its value."""
        name, value = self._name(), self._value()
        planted = [(depth, self._assignment(name, value))]
        return self._probe(length, planted, self._question(f"secret_{name}"), self.encode(value))

    def variable_tracking(self, length: int, hops: int = HOPS) -> Probe:
        """A chain of assignments spread over the text; asked for the value at its end."""
        names, value = [self._name() for _ in range(hops + 1)], self._value()
        lines = [self._assignment(names[0], value)]
        lines += [self.encode(f"\nsecret_{new} = secret_{old}\n") for old, new in zip(names, names[1:])]
        depths = sorted(self.random.random() * 0.98 for _ in lines)
        return self._probe(length, list(zip(depths, lines)), self._question(f"secret_{names[-1]}"), self.encode(value))

    def aggregation(self, length: int) -> Probe:
        """Votes for some words all over the text; asked for the word with most of them."""
        words = [self._name() for _ in range(CANDIDATES)]
        ballots = [words[0]] * VOTES_OF_THE_WINNER + [word for word in words[1:] for _ in range(VOTES_EACH)]
        planted = [
            (self.random.random() * 0.98, [*self.encode('\nvote("'), *self.encode(word), *self.encode('")\n')])
            for word in ballots
        ]
        return self._probe(length, sorted(planted), self.encode('\nmost_votes = "'), self.encode(words[0]))

    def copy(self, length: int, distance: int, span: int = 64) -> Probe:
        """Text whose end repeats what stands ``distance`` tokens before, word for word, after a fourth as a cue."""
        tokens = self._filler(length)
        tokens[-span:] = tokens[length - span - distance : length - distance]
        return Probe(tokens, length - span * 3 // 4)

    def training_row(self, length: int, questions: int) -> Tensor:
        """Real text with needles, chains and votes in it, each asked for somewhere later: what tuning may see."""
        pieces = []
        per_piece = length // questions
        for i in range(questions):
            size = per_piece if i < questions - 1 else length - per_piece * (questions - 1)
            kind = self.random.choice(("needle", "needle", "variable_tracking", "aggregation"))
            probe = self.needle(size, self.random.random()) if kind == "needle" else getattr(self, kind)(size)
            pieces.append(probe.tokens)
        return torch.cat(pieces)

    def _probe(self, length: int, planted: list[tuple[float, list[int]]], question: list[int], answer: list[int]):
        end = [*question, *answer]
        room = length - len(end) - sum(len(line) for _, line in planted)
        if room < 0:
            raise ValueError(f"a probe of {length} tokens has no room for {length - room} planted ones")
        filler = self._filler(room)
        parts, last = [], 0
        for depth, line in planted:
            place = int(depth * room)
            parts += [filler[last:place], torch.tensor(line)]
            last = place
        tokens = torch.cat([*parts, filler[last:], torch.tensor(end)])
        return Probe(tokens, length - len(answer))

    def _filler(self, length: int) -> Tensor:
        start = self.random.randrange(len(self.text) - length)
        return self.text[start : start + length].clone()

    def _assignment(self, name: str, value: str) -> list[int]:
        # The value's tokens by themselves, so that question and line have the same.
        return [*self.encode(f'\nsecret_{name} = "'), *self.encode(value), *self.encode('"\n')]

    def _question(self, name: str) -> list[int]:
        return self.encode(f'\nassert {name} == "')

    def _name(self) -> str:
        return "".join(self.random.choices("abcdefghijklmnopqrstuvwxyz", k=5))

    def _value(self) -> str:
        return "".join(self.random.choices("0123456789", k=5))


@torch.no_grad()
def answered(model, probes: list[Probe]) -> tuple[float, float]:
    """Ask a causal LM all probes; return the share answered right and the mean loss of the answers' tokens."""
    right, losses = 0, []
    for probe in probes:
        tokens = probe.tokens.to(model.device)[None]
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[0, probe.answer_start - 1 : -1]).float()
        answer = tokens[0, probe.answer_start :]
        right += bool((logits.argmax(-1) == answer).all())
        losses.append(torch.nn.functional.cross_entropy(logits, answer).item())
    return right / len(probes), sum(losses) / len(losses)
