"""What does a retrofit keep of a dense model's quality at long context, and what does each part of it cost?

A dense Llama is trained at a short context on Python source, then given longer ones in every way of
``retrofit_variants.py``, with RoPE stretched ("NTK-aware") and the same tokens to tune on. Measured on packages that
were held out: perplexity by position and by context, copies by distance, needles by depth, variable tracking and
aggregation; beside them attention FLOPs and KV entries. Then smaller models from scratch, at equal training FLOPs.

Every second row that a model trains on, from the first step on, has questions like those asked later planted in its
text (other names, other values, other text), and the tokens of their answers weigh more in the loss: without them a
model this small would not know the form of the question.

    PYTHONPATH=.:benchmarks python benchmarks/retrofit_quality.py --work FOLDER
    PYTHONPATH=.:benchmarks python benchmarks/retrofit_quality.py --work FOLDER --small        the path, on a CPU

Everything is kept in the folder: what is finished is not done again, training stops at ``--limit`` seconds and goes on
from there when the same command is given again, tables and plots are written anew after each result. Several processes
may run the same command at once, one per GPU (``CUDA_VISIBLE_DEVICES``): each takes the next job that nobody has.
"""

import argparse
import gc
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path

import torch
from job_claims import Job, work_through
from long_context_probes import Probe, Prober, answered
from quality_corpus import Corpus, TrainingRows, build_corpus
from quality_report import write_report
from retrofit_variants import CORE, DENSE, VARIANTS, Variant, apply, attention_flops, is_distinct, kv_entries
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modeling_longnet import DilationPattern, LongNetConfig, LongNetForCausalLM, apply_liger_kernel_to_longnet
from modeling_longnet.head_loss import IGNORED, head_loss, next_tokens, token_losses


STAGES = ("corpus", "pretrain", "tune", "scratch", "report")
RULES = ("segment_lengths", "dilation_rates", "head_offsets", "count_overlaps", "dilate_queries", "window")
MICRO_TOKENS = 65_536  # that go through a model at once: 40 GB of activations in training
DEPTHS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)


@dataclass(frozen=True)
class Settings:
    """All that the numbers depend on; kept in the folder, and never changed within one."""

    context: int = 2048
    lengths: tuple[int, ...] = (16384, 32768)
    contexts: tuple[int, ...] = (2048, 8192, 32768)  # to which held-out text is cut
    vocabulary: int = 16384
    shape: tuple[tuple[str, int], ...] = (
        ("hidden_size", 1024), ("intermediate_size", 2816), ("num_hidden_layers", 8), ("num_attention_heads", 16),
        ("num_key_value_heads", 8), ("head_dim", 64),
    )  # fmt: skip
    corpus_bytes: int = 400_000_000
    pretrain_tokens: int = 200_000_000
    pretrain_seconds: float = math.inf  # after 30 steps, their number is cut to what this time allows
    pretrain_batch_tokens: int = 65_536
    pretrain_learning_rate: float = 6e-3
    tune_steps: int = 100
    tune_batch_tokens: int = 65_536
    tune_learning_rate: float = 2e-3
    probe_share: float = 0.5
    tokens_per_probe: int = 256  # in rows with questions, at least
    answer_weight: float = 0.1
    pieces: int = 48
    trials: int = 24
    scratch_shape: tuple[tuple[str, int], ...] = (
        ("hidden_size", 512), ("intermediate_size", 1408), ("num_hidden_layers", 8), ("num_attention_heads", 8),
        ("num_key_value_heads", 8), ("head_dim", 64),
    )  # fmt: skip
    scratch_flops: float = 2e16
    scratch_length: int = 32768
    liger: bool = False

    @classmethod
    def small(cls) -> "Settings":
        """Settings that a CPU runs through in half a minute."""
        shape = (
            ("hidden_size", 32), ("intermediate_size", 64), ("num_hidden_layers", 2), ("num_attention_heads", 4),
            ("num_key_value_heads", 2), ("head_dim", 8),
        )  # fmt: skip
        return cls(
            context=256, lengths=(512, 1024), contexts=(256, 512, 1024), vocabulary=512, shape=shape,
            corpus_bytes=400_000, pretrain_tokens=4096, pretrain_batch_tokens=1024, tune_steps=2,
            tune_batch_tokens=1024, pieces=2, trials=1, scratch_shape=shape, scratch_flops=1e9, scratch_length=1024,
        )  # fmt: skip


class OutOfTime(Exception):
    """The limit is reached; what was done is saved."""


class Study:
    """The experiment in one folder."""

    def __init__(self, folder: Path, settings: Settings, limit_s: float, output: Path, workers: int = 2):
        self.folder, self.settings, self.output, self.workers = folder, settings, output, workers
        self.deadline = time.monotonic() + limit_s
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.corpus = Corpus(folder)
        folder.mkdir(parents=True, exist_ok=True)
        saved = folder / "settings.json"
        ours = json.dumps(asdict(settings), indent=1)
        if not saved.exists():
            _write(saved, ours)
        elif saved.read_text() != ours:
            raise SystemExit(f"error: {saved} has other settings than asked for now; choose another --work")

    def jobs(self, stages: list[str], names: list[str]) -> list[Job]:
        """List what is to do, the most telling first.

        Args:
            stages: some of ``STAGES``.
            names: of variants, at all lengths or at one (``NAME@LENGTH``).
        """
        settings, corpus, dense = self.settings, self.folder / "held_out.npy", self.folder / "dense"
        order = dict.fromkeys((*CORE, *(name.partition("@")[0] for name in names)))
        asked = [
            (name, length) for length in settings.lengths for name in order if {name, f"{name}@{length}"} & set(names)
        ]
        core = [tuning for tuning in asked if tuning[0] in CORE]
        others = [tuning for tuning in asked if tuning not in core]
        soon = [(name, length) for name, length in others if length == settings.lengths[0]]
        late = [tuning for tuning in others if tuning not in soon]
        jobs = {"corpus": [Job(corpus, self.build_corpus)], "pretrain": [Job(dense, self.pretrain, (corpus,))]}
        base = [Job(self.folder / "base.json", self.base, (dense,))]
        jobs["tune"] = [*base, *self._tunings([*core, *soon])]
        jobs["scratch"] = [self._scratch(name, corpus) for name in ("dense", "paper", "window", "paper_magneto")]
        chosen = [jobs[stage] for stage in STAGES if stage in stages and stage in jobs]
        return [*(job for stage in chosen for job in stage), *(self._tunings(late) if "tune" in stages else ())]

    def work(self, jobs: list[Job]) -> None:
        """Do the jobs, and report after each."""

        def after_each() -> None:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            write_report(self.folder, self.output, self.settings, in_words=False)

        work_through(jobs, OutOfTime, after_each, self._check_time)

    # --- training ---

    def build_corpus(self) -> None:
        """Read packages, train a tokenizer, and keep both kinds of text as token ids."""
        build_corpus(self.folder, self.settings.corpus_bytes, self.settings.vocabulary)

    def rows(self, seed: str, length: int, batch_tokens: int) -> TrainingRows:
        """Return the batches of a training run."""
        settings = self.settings
        return TrainingRows(self.corpus, seed, length, batch_tokens, settings.probe_share, settings.tokens_per_probe)

    def train(
        self,
        name: str,
        model: PreTrainedModel,
        rows: TrainingRows,
        steps: int,
        learning_rate: float,
        seconds_at_most: float = math.inf,
    ) -> dict:
        """Train with bfloat16 autocast and a cosine schedule; go on from a saved state, save one at the limit.

        Torch's Muon is the optimizer of the layers' matrices, AdamW of all else.

        Returns:
            What it took: steps, tokens, seconds, losses.
        """
        state_path = self.folder / f"{name}.state.pt"
        optimizers = self._optimizers(model, learning_rate)
        step, seconds, losses, warm_up = 0, 0.0, [], max(1, steps // 20)
        if state_path.exists():
            state = torch.load(state_path, map_location=self.device, weights_only=True)
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            step, steps, seconds, losses = state["step"], state["steps"], state["seconds"], state["losses"]
        model.train()
        start = time.monotonic()
        spent: dict[int, float] = {}
        for batch, answers in self._batches(rows, step, steps):
            if time.monotonic() > self.deadline:
                seconds += time.monotonic() - start
                saved = [optimizer.state_dict() for optimizer in optimizers]
                state = {"model": model.state_dict(), "optimizers": saved, "step": step}
                temporary = state_path.with_suffix(".part")
                torch.save(state | {"steps": steps, "seconds": seconds, "losses": losses}, temporary)
                temporary.replace(state_path)
                raise OutOfTime(f"{name} stands at step {step} of {steps}")
            rate = min((step + 1) / warm_up, 0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = learning_rate * rate
            total = torch.zeros(2, device=self.device)
            micro = max(1, MICRO_TOKENS // batch.shape[1])
            for part, marked in zip(batch.split(micro), answers.split(micro)):
                with torch.autocast(self.device.type, torch.bfloat16):
                    text, answer = self._losses(model, part.to(self.device), marked.to(self.device))
                    loss = (text + self.settings.answer_weight * answer) * (len(part) / len(batch))
                loss.backward()
                total += torch.stack([text.detach(), answer.detach()]) * (len(part) / len(batch))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % 10 == 0 or step == steps:
                text, answer = total.tolist()
                losses.append([step, text, answer])
                spent[step] = seconds + time.monotonic() - start
                print(
                    f"{name}: step {step}/{steps}, loss {text:.3f}, answers {answer:.3f}, {spent[step]:.0f} s",
                    flush=True,
                )
                if step == 30 and 10 in spent and seconds_at_most < math.inf:
                    affordable = affordable_steps(spent[10], spent[30], seconds_at_most)
                    if affordable < steps:
                        print(f"{name}: {seconds_at_most:.0f} s are enough for {affordable} steps", flush=True)
                        steps = affordable
            if step >= steps:
                break
        if not all(math.isfinite(text) for _, text, _ in losses):
            raise ValueError(f"{name}: the loss is {losses[-1][1]} after {step} steps; lower the learning rate")
        state_path.unlink(missing_ok=True)
        model.eval()
        return {
            "steps": steps, "tokens": steps * rows.batch * rows.length, "losses": losses,
            "seconds": round(seconds + time.monotonic() - start, 1),
        }  # fmt: skip

    def _optimizers(self, model: PreTrainedModel, learning_rate: float) -> list[torch.optim.Optimizer]:
        matrices = [x for x in model.model.layers.parameters() if x.ndim == 2]
        taken = set(matrices)
        rest = [x for x in model.parameters() if x not in taken]
        options = {"betas": (0.9, 0.95), "weight_decay": 0.1, "fused": self.device.type == "cuda"}
        # Muon's steps are made as large as AdamW's: one learning rate serves both.
        muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        return [torch.optim.AdamW(rest, lr=learning_rate, **options), muon]

    def _batches(self, rows: TrainingRows, first: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches, made ahead by other processes."""
        options = {"prefetch_factor": 4, "multiprocessing_context": "fork"} if self.workers else {}
        loader = DataLoader(Subset(rows, range(first, end)), batch_size=None, num_workers=self.workers, **options)
        yield from loader

    @staticmethod
    def _losses(model: PreTrainedModel, rows: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the mean loss of all tokens, and of those that answer a question (0 without any)."""
        hidden = model.model(input_ids=rows, use_cache=False).last_hidden_state
        marked = rows.masked_fill(~answers, IGNORED)
        count = answers[:, 1:].sum().clamp(min=1)
        text = head_loss(hidden, model.lm_head, next_tokens(rows))
        return text, head_loss(hidden, model.lm_head, next_tokens(marked), num_items=count)

    def pretrain(self) -> None:
        """Train the dense model at the short context; what is kept is an ordinary Llama."""
        target, settings = self.folder / "dense", self.settings
        torch.manual_seed(0)
        fields = dict(settings.shape) | {
            "vocab_size": settings.vocabulary, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
            "max_position_embeddings": settings.context,
        }  # fmt: skip
        # Ordinary attention, and Llama's own parameters: LongNet's class only for its loss without logits.
        model = self._prepared(LongNetForCausalLM(LongNetConfig(**fields, **_pattern_fields(DENSE))))
        print(f"pretrain: {model.num_parameters():,} parameters", flush=True)
        rows = self.rows("pretrain", settings.context, settings.pretrain_batch_tokens)
        steps = settings.pretrain_tokens // settings.pretrain_batch_tokens
        training = self.train(
            "pretrain", model, rows, steps, settings.pretrain_learning_rate, settings.pretrain_seconds
        )
        llama = LlamaForCausalLM(LlamaConfig(**fields))
        llama.load_state_dict(model.state_dict())
        temporary = self.folder / "dense.part"
        llama.save_pretrained(temporary)
        (temporary / "training.json").write_text(
            json.dumps(training | {"parameters": model.num_parameters(), **self._origin()})
        )
        temporary.rename(target)

    def stretched(self, length: int) -> LongNetForCausalLM:
        """Load the dense model's weights into a LongNet model with RoPE stretched to ``length``."""
        llama = LlamaForCausalLM.from_pretrained(self.folder / "dense")
        fields = llama.config.to_dict()
        for name in ("model_type", "architectures", "transformers_version", "dtype"):
            fields.pop(name, None)
        head_dim, stretch = llama.config.head_dim, length / self.settings.context
        rope = dict(llama.config.rope_parameters)
        rope["rope_theta"] *= stretch ** (head_dim / (head_dim - 2))
        fields |= {"rope_parameters": rope, "max_position_embeddings": length}
        model = LongNetForCausalLM(LongNetConfig(**fields, **_pattern_fields(DENSE)))
        model.load_state_dict(llama.state_dict())
        return self._prepared(model)

    def _prepared(self, model: LongNetForCausalLM) -> LongNetForCausalLM:
        if self.settings.liger and model.config.backbone == "llama":
            apply_liger_kernel_to_longnet(model)
        return model.to(self.device)

    # --- measuring ---

    @torch.no_grad()
    def losses(self, model: PreTrainedModel, rows: Tensor) -> Tensor:
        """Compute the loss of each token but the first, ``[count, length - 1]``."""
        found = []
        for part in rows.split(max(1, MICRO_TOKENS // rows.shape[1])):
            tokens = part.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16):
                hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
                found.append(token_losses(hidden, model.lm_head, next_tokens(tokens))[:, :-1].float().cpu())
        return torch.cat(found)

    def perplexities(self, model: PreTrainedModel, length: int, longest: int) -> dict:
        """Measure the loss on held-out pieces of ``length`` tokens, cut to every context up to ``longest``.

        The same text at each context: what a longer one gives is the difference.
        """
        model.eval()
        pieces = self.corpus.pieces(length, self.settings.pieces)
        contexts = sorted({n for n in (*self.settings.contexts, longest) if n <= longest and length % n == 0})
        result: dict = {"nll_at": {}, "nll_at_by_piece": {}}
        for context in contexts:
            losses = self.losses(model, pieces.view(-1, context))
            by_piece = losses.view(len(pieces), -1).mean(1)
            result["nll_at"][str(context)] = losses.mean().item()
            result["nll_at_by_piece"][str(context)] = [round(x, 5) for x in by_piece.tolist()]
            if context == length:
                result["nll"] = losses.mean().item()
                result["nll_by_piece"] = result["nll_at_by_piece"][str(context)]
                result["nll_by_position"] = [part.mean().item() for part in losses.mean(0).tensor_split(32)]
        return result

    @cache  # noqa: B019  (one study per process)
    def probes(self, length: int) -> dict[str, dict[str, list[Probe]]]:
        """Make the probes of a length: by kind, and by depth or distance; the same for every model."""
        trials = self.settings.trials
        prober = Prober(self.corpus.encode, self.corpus.tokens("held_out"), seed=length)
        distances = [d for d in (length // 16, length // 5, length // 2, length - 256) if d >= 64]
        return {
            "needle": {str(depth): [prober.needle(length, depth) for _ in range(trials)] for depth in DEPTHS},
            "variable_tracking": {"": [prober.variable_tracking(length) for _ in range(2 * trials)]},
            "aggregation": {"": [prober.aggregation(length) for _ in range(2 * trials)]},
            "copy": {str(d): [prober.copy(length, d) for _ in range(max(1, trials // 2))] for d in distances},
        }

    def retrieval(self, model: PreTrainedModel, length: int) -> dict:
        """Ask a model all probes of a length."""
        probes, batch = self.probes(length), max(1, MICRO_TOKENS // length)
        with torch.autocast(self.device.type, torch.bfloat16):
            found = {
                kind: {place: answered(model, asked, batch) for place, asked in places.items()}
                for kind, places in probes.items()
            }
        return {
            "needle": {depth: right for depth, (right, _) in found["needle"].items()},
            "needle_answer_nll": {depth: nll for depth, (_, nll) in found["needle"].items()},
            "variable_tracking": found["variable_tracking"][""][0],
            "aggregation": found["aggregation"][""][0],
            "copy_nll": {distance: nll for distance, (_, nll) in found["copy"].items()},
            "trials": {"needle": self.settings.trials, "tasks": 2 * self.settings.trials},
        }

    # --- jobs ---

    def base(self) -> None:
        """Measure the dense model at its own context, on the text of every length, before anything is changed."""
        settings = self.settings
        model = LlamaForCausalLM.from_pretrained(self.folder / "dense").to(self.device).eval()
        result: dict = {"on_text_of": {}}
        for length in settings.lengths:
            result["on_text_of"][str(length)] = self.perplexities(model, length, settings.context)
        result |= self.retrieval(model, settings.context)
        result["training"] = json.loads((self.folder / "dense" / "training.json").read_text())
        self._save(self.folder / "base.json", result)

    def _tunings(self, asked: list[tuple[str, int]]) -> list[Job]:
        config, settings = LlamaConfig(**dict(self.settings.shape)), self.settings
        jobs = []
        for name, length in asked:
            variant, path = VARIANTS[name], self.folder / f"tuned_{name}_{length}.json"
            if is_distinct(variant, config, settings.context, length):
                jobs.append(Job(path, partial(self.tune, variant, length, path), (self.folder / "dense",)))
        return jobs

    def tune(self, variant: Variant, length: int, path: Path) -> None:
        """Tune a variant for a length and measure it."""
        settings, start = self.settings, time.monotonic()
        torch.manual_seed(0)
        model = self.stretched(length)
        apply(model, variant, settings.context, length, training=False)
        before = self.losses(model.eval(), self.corpus.pieces(length, settings.pieces)).mean().item()
        apply(model, variant, settings.context, length, training=True)
        rows = self.rows(f"tune {length}", length, settings.tune_batch_tokens)  # the same for every variant
        steps = settings.tune_steps * variant.times_tokens
        training = self.train(path.stem, model, rows, steps, settings.tune_learning_rate)
        apply(model, variant, settings.context, length, training=False)
        result = self.perplexities(model, length, length) | self.retrieval(model, length)
        result |= {
            "variant": variant.name, "length": length, "note": variant.note, "untuned_nll": before,
            "training": training, "seconds": round(time.monotonic() - start, 1),
            "attention_flops": attention_flops(variant, model.config, settings.context, length),
            "attention_flops_131072": attention_flops(variant, model.config, settings.context, 2**17),
            "kv_entries": kv_entries(variant, model.config, settings.context, length),
        }  # fmt: skip
        self._save(path, result)

    def _scratch(self, name: str, corpus: Path) -> Job:
        path = self.folder / f"scratch_{name}.json"
        return Job(path, lambda: self.scratch(name, path), (corpus,))

    def scratch(self, name: str, path: Path) -> None:
        """Train a model from scratch, for as many tokens as the same training FLOPs allow, and measure it."""
        settings = self.settings
        length, shape = settings.scratch_length, dict(settings.scratch_shape)
        pattern = {
            "dense": DENSE,
            "window": DilationPattern.preset("retrofit", (settings.context,), (1,)),
            "paper": DilationPattern.geometric(settings.context, length, preset="paper"),
        }[name.removesuffix("_magneto")]
        torch.manual_seed(0)
        config = LongNetConfig(
            **shape, **_pattern_fields(pattern), backbone="magneto" if name.endswith("_magneto") else "llama",
            tie_word_embeddings=True, vocab_size=settings.vocabulary, max_position_embeddings=length,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = self._prepared(LongNetForCausalLM(config))
        attention = shape["num_hidden_layers"] * pattern.attention_flops(
            length, shape["num_attention_heads"], shape["head_dim"], num_kv_heads=shape["num_key_value_heads"]
        )
        weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)
        per_row = 6 * weights * length + 3 * attention
        rows = self.rows("scratch", length, settings.tune_batch_tokens)
        steps = max(1, round(settings.scratch_flops / per_row / rows.batch))
        training = self.train(path.stem, model, rows, steps, settings.pretrain_learning_rate)
        result = self.perplexities(model, length, length) | {
            "variant": name, "length": length, "training": training, "parameters": model.num_parameters(),
            "training_flops": per_row * rows.batch * steps, "attention_share": 3 * attention / per_row,
        }  # fmt: skip
        self._save(path, result)

    def report(self) -> None:
        """Write tables and plots of what the folder holds so far."""
        write_report(self.folder, self.output, self.settings)

    def _check_time(self, what: str) -> None:
        if time.monotonic() > self.deadline:
            raise OutOfTime(f"next is {what}")

    def _origin(self) -> dict:
        card = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        return {"card": card, "torch": torch.__version__, "time": datetime.now(UTC).isoformat(timespec="seconds")}

    def _save(self, path: Path, result: dict) -> None:
        _write(path, json.dumps(result | self._origin(), indent=1))
        print(f"{path.stem}: nll {result.get('nll_at')}, needle {result.get('needle')}", flush=True)


def affordable_steps(after_10: float, after_30: float, seconds: float) -> int:
    """Say how many steps end ``seconds`` after the first began, from the seconds spent after 10 and after 30."""
    return max(30, 30 + int((seconds - after_30) / ((after_30 - after_10) / 20)))


def _variant_name(text: str) -> str:
    name, at, length = text.partition("@")
    if name not in VARIANTS or (at and not length.isdecimal()):
        raise argparse.ArgumentTypeError(f"no NAME or NAME@LENGTH: {text!r}; names are {', '.join(VARIANTS)}")
    return text


def find_problem(arguments: argparse.Namespace, settings: Settings) -> str | None:
    """Say what is wrong with the options, None if nothing is."""
    for name in ("pretrain_tokens", "pretrain_seconds", "tune_steps", "scratch_flops"):
        if not getattr(settings, name) > 0:
            return f"--{name.replace('_', '-')} must be more than 0, got {getattr(settings, name)}"
    if settings.pretrain_tokens < settings.pretrain_batch_tokens:
        return f"--pretrain-tokens {settings.pretrain_tokens} are less than a batch, {settings.pretrain_batch_tokens}"
    if arguments.workers < 0:
        return f"--workers must be at least 0, got {arguments.workers}"
    for option, folder in (("--work", arguments.work), ("--output", arguments.output)):
        if folder.exists() and not folder.is_dir():
            return f"{option} {folder} is no folder"
    lengths = settings.lengths
    if list(lengths) != sorted(set(lengths)) or lengths[0] < settings.context:
        shown = " ".join(map(str, lengths))
        return f"--lengths must ascend from the trained context, {settings.context}, or more, got {shown}"
    for name, _, length in (text.partition("@") for text in arguments.variants):
        if length and int(length) not in lengths:
            return f"{name} at {length}: the lengths are {', '.join(map(str, lengths))} (--lengths)"
        for asked in [int(length)] if length else lengths:
            try:
                VARIANTS[name].pattern(settings.context, asked)
            except ValueError as error:
                return f"--lengths {asked} does not fit {name}: {error}"
    return None


def _pattern_fields(pattern: DilationPattern) -> dict:
    return {rule: getattr(pattern, rule) for rule in RULES}


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_text(text)
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the experiment")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument(
        "--variants", nargs="+", type=_variant_name, default=list(VARIANTS), metavar="NAME[@LENGTH]",
        help="at all lengths or at one, the most wanted first: " + ", ".join(VARIANTS),
    )  # fmt: skip
    parser.add_argument("--limit", type=float, default=math.inf, help="stop and save after so many seconds")
    parser.add_argument("--small", action="store_true", help="tiny sizes: tests the path on any machine")
    parser.add_argument("--lengths", type=int, nargs="+", help="contexts to tune for, ascending")
    parser.add_argument("--pretrain-tokens", type=int)
    parser.add_argument("--pretrain-seconds", type=float, help="fewer tokens, if they would take longer")
    parser.add_argument("--tune-steps", type=int)
    parser.add_argument("--scratch-flops", type=float, help="per model")
    parser.add_argument("--liger", action="store_true", default=None, help="fused layers (needs liger-kernel)")
    parser.add_argument("--workers", type=int, default=2, help="processes that make training rows")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    chosen = ("lengths", "pretrain_tokens", "pretrain_seconds", "tune_steps", "scratch_flops", "liger")
    given = {name: getattr(arguments, name) for name in chosen if getattr(arguments, name) is not None}
    if "lengths" in given:
        given["lengths"] = tuple(given["lengths"])
    settings = Settings(**{**asdict(Settings.small() if arguments.small else Settings()), **given})
    if problem := find_problem(arguments, settings):
        parser.error(problem)
    study = Study(arguments.work, settings, arguments.limit, arguments.output, arguments.workers)
    try:
        study.work(study.jobs(arguments.stages, arguments.variants))
    except OutOfTime as stop:
        print(f"stopped at the limit: {stop}; give the same command again to go on")
    if "report" in arguments.stages:
        study.report()


if __name__ == "__main__":
    main()
