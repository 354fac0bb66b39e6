"""A model directory, prompts and the options of sampling -> completions, for verbs that sample."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from alignjax.core.types import Tokenizer
    from alignjax.data import Example

    Encode = Callable[[Example], np.ndarray]


class Sampled(NamedTuple):
    """One completion."""

    text: str
    """Special tokens left out."""
    num_tokens: int
    logp: float
    """Nats, of all its tokens."""
    is_truncated: bool
    """Whether `max_tokens` ended it."""


def add_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--max-tokens", type=int, metavar="N", help="default: 256, or what fits")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: 1)")
    parser.add_argument("--top-p", type=float, default=1.0, help="in (0, 1] (default: 1)")
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps all (default)")
    parser.add_argument(
        "--min-p", type=float, default=0.0,
        help="leave out what is less likely than this share of the most likely (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X",
        help="above 1 against tokens of the prompt and of what was said (default: 1)",
    )  # fmt: skip
    parser.add_argument("--stop", action="append", default=[], metavar="TOKEN", help="besides EOS")
    parser.add_argument(
        "--stop-sequence", action="append", default=[], metavar="TEXT",
        help="ends a completion too: several tokens, as the tokenizer cuts them after other text",
    )  # fmt: skip
    parser.add_argument(
        "--ban", action="append", default=[], metavar="TOKEN", help="never sampled (repeatable)"
    )
    parser.add_argument("--prefix", default="", metavar="TEXT", help="starts each completion")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
        help="of the matrix products (default: bfloat16 on TPU and GPU, float32 on CPU)",
    )  # fmt: skip
    parser.add_argument(
        "--int8-kv", action="store_true", help="keys and values as codes, to save memory"
    )
    parser.add_argument(
        "--int8-weights", action="store_true", help="kernels as codes, to save memory"
    )


def check(args: argparse.Namespace) -> None:
    """Raises UserError on a value of `add_arguments` that makes no sense."""
    from alignjax.core.errors import UserError

    for name, is_good, expected in (
        ("max_tokens", args.max_tokens is None or args.max_tokens >= 1, "at least 1"),
        ("temperature", 0 <= args.temperature < float("inf"), "at least 0"),
        ("top_p", 0 < args.top_p <= 1, "above 0 and at most 1"),
        ("top_k", args.top_k >= 0, "at least 0"),
        ("min_p", 0 <= args.min_p <= 1, "from 0 to 1"),
        ("repetition_penalty", 0 < args.repetition_penalty < float("inf"), "above 0"),
    ):
        if not is_good:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {getattr(args, name)}: expected {expected}")


class Sampler:
    """A model with its tokenizer, loaded once; see `sample`."""

    def __init__(self, path: str, args: argparse.Namespace):
        """Args: path: directory or id of the model; args: with what `add_arguments` adds."""
        from alignjax.cli.runtime import prepare

        prepare()
        from alignjax.core.precision import compute_dtype
        from alignjax.generate import make_generate
        from alignjax.models import load, load_eos_ids
        from alignjax.sharding import MeshConfig, make_mesh
        from alignjax.text import check_fits, load_tokenizer, stop_ids

        self._path, self._args = path, args
        self.tokenizer: Tokenizer = load_tokenizer(path)
        mesh = make_mesh(MeshConfig())
        self._dtype = compute_dtype(args.dtype, mesh.devices.flat[0].platform)
        model, self._params = load(path, mesh=mesh, compute_dtype=self._dtype)
        check_fits(self.tokenizer, model.config.vocab_size, path)
        self.context = model.config.max_position_embeddings
        self._generate = make_generate(
            model, mesh=mesh, int8_kv=args.int8_kv, int8_weights=args.int8_weights
        )
        self._stop = stop_ids(self.tokenizer, args.stop, load_eos_ids(path))

    def _ids(self, text: str) -> list[int]:
        """Of a text that comes after another."""
        return self.tokenizer.encode(text, [-1])

    def _banned(self) -> tuple[int, ...]:
        from alignjax.core.errors import UserError

        ids = [self._ids(token) for token in self._args.ban]
        for token, pieces in zip(self._args.ban, ids, strict=True):
            if len(pieces) != 1:
                raise UserError(
                    f"--ban {token!r}: {len(pieces)} tokens in this vocabulary; expected one"
                )
        return tuple(pieces[0] for pieces in ids)

    def max_tokens(self, longest: int) -> int:
        """The limit on tokens of a completion, of prompts of at most `longest` tokens."""
        if self._args.max_tokens is not None:
            return self._args.max_tokens
        return max(1, min(256, self.context - longest))

    def sample(
        self, prompts: Sequence[np.ndarray], num_samples: int, *, max_tokens: int, turn: int = 0
    ) -> list[Sampled]:
        """Samples `num_samples` completions of each prompt, those of a prompt together.

        Args:
          prompts: ids, [length] int32 each.
          num_samples: of each.
          max_tokens: largest number of tokens of a completion.
          turn: another number gives other samples.
        Raises:
          UserError: on a prompt that is empty or too long, on numbers that are none.
        """
        import jax
        import numpy as np

        from alignjax.core.errors import UserError
        from alignjax.core.types import LENGTH, Sampling

        args = self._args
        if not all(map(len, prompts)):
            raise UserError("a prompt is empty, and this tokenizer has no BOS to begin with")
        lengths = np.array([len(ids) for ids in prompts])
        tokens = np.zeros((len(prompts), lengths.max()), np.int32)
        for row, ids in zip(tokens, prompts, strict=True):
            row[: len(ids)] = ids
        sampling = Sampling(
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            max_tokens=max_tokens,
            min_p=args.min_p,
            stop_tokens=self._stop,
            stop_sequences=tuple(tuple(self._ids(text)) for text in args.stop_sequence),
            repetition_penalty=args.repetition_penalty,
            banned_tokens=self._banned(),
            forced_tokens=tuple(self._ids(args.prefix)),
            num_samples=num_samples,
        )
        key = jax.random.PRNGKey(args.seed)
        if turn:
            key = jax.random.fold_in(key, turn)
        try:
            out = self._generate(self._params, tokens, lengths, key, sampling)
        except ValueError as error:  # What the engine refuses here came from the command line.
            raise UserError(str(error)) from error
        if not np.isfinite(out.logps).all():
            raise UserError(
                f"{self._path}: log-probs are not finite: the weights hold nan or inf, or are too "
                f"large for --dtype {self._dtype} or --temperature {args.temperature}"
            )
        rows = zip(out.tokens, out.lengths, out.logps, out.finish_reasons, strict=True)
        return [
            Sampled(
                self.tokenizer.decode(row[:length]), int(length), float(logps.sum()),
                reason == LENGTH,
            )
            for row, length, logps, reason in rows
        ]  # fmt: skip
