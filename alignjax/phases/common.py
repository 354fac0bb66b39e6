"""What every phase has: a model with its tokenizer, text turned into ids, and an export."""

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import jax
from jax import Array
from jax.sharding import Mesh
from pydantic import Field, model_validator

from alignjax.core.config import Config, DirectoryName
from alignjax.core.errors import UserError
from alignjax.core.precision import compute_dtype
from alignjax.core.processes import is_first, wait_for_all
from alignjax.core.types import Params
from alignjax.losses import TokenLogps, next_token_logps
from alignjax.losses.vocabulary import default_chunk_size
from alignjax.models import Model, ModelConfig, load, load_eos_ids, lora, peft, save
from alignjax.models.lora import LoraConfig
from alignjax.sharding import MeshConfig, batch_shards, init_sharded, make_mesh, shardings
from alignjax.text import HFTokenizer, check_fits, load_tokenizer, stop_ids
from alignjax.train.loop import LoopConfig
from alignjax.train.optim import OptimizerConfig
from alignjax.train.step import Batch


class NewModel(ModelConfig):
    """A model to be created: as ModelConfig, but the vocabulary is the tokenizer's if not given."""

    vocab_size: int | None = Field(default=None, ge=1)  # type: ignore[assignment]


class ModelSource(Config):
    """Where the weights come from: a Hugging Face directory, or a random start."""

    path: str | None = None
    """A directory with config.json and safetensors, such as runs/NAME/model; or an id of the Hub,
    such as Qwen/Qwen3-0.6B."""
    init: NewModel | None = None
    """The shape of a model to start from nothing."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matrix products. auto: bfloat16 on TPU and GPU, float32 on CPU."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters as they are kept and trained. bfloat16 takes half the memory, and each
    update is rounded at random (`train.rounding`); moments and sums of gradients stay float32."""
    remat: bool = False
    """Recompute layers in the backward pass: less memory, about a third more time."""
    lora: LoraConfig | None = None
    """Train adapters beside the weights of path, which stay as they are."""
    adapter: str | None = None
    """A directory of PEFT with the adapters to start from, instead of new ones. The reference of
    RL is nevertheless path alone: export it merged and name that as path to stay near both."""
    quantize: Literal["int8", "nf4"] | None = None
    """Hold the frozen kernels of the layers in 8 or 4 bits (QLoRA); needs lora."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.path is None) == (self.init is None):
            raise ValueError("give either path (a directory) or init (a shape to start from)")
        if self.lora is not None and self.path is None:
            raise ValueError("lora adapts a model that is there: give path instead of init")
        if self.adapter is not None and self.lora is None:
            raise ValueError(
                f"adapter={self.adapter!r} is read with lora, which says its rank, alpha and "
                "targets: give lora as well"
            )
        if self.quantize is not None and self.lora is None:
            raise ValueError(
                f"quantize={self.quantize!r} is for weights that do not train: give lora as well, "
                "such as lora: {rank: 16}, or leave quantize out"
            )
        return self


class PhaseConfig(Config):
    """What the configs of all train phases share."""

    name: DirectoryName
    """The run's directory is output_dir/name."""
    output_dir: str = "runs"
    seed: int = Field(0, ge=0)
    model: ModelSource
    tokenizer: str | None = None
    """A directory with a tokenizer, or an id of the Hub; the model's own if not given."""
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loop: LoopConfig = LoopConfig()

    def training_mesh(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh of what trains, on all devices (of all processes), or on those given.

        Raises: UserError: if they do not fit it.
        """
        return make_mesh(self.mesh, devices)

    def tokenizer_source(self) -> str:
        """Where the tokenizer is: named by itself, or the model's. Raises UserError if neither."""
        source = self.tokenizer or self.model.path
        if source is None:
            raise UserError(
                "tokenizer: a model to be created (model.init) needs a tokenizer's directory"
            )
        return source


class Policy:
    """A model that is trained, its tokenizer, and where its weights come from.

    Attributes:
      frozen: under LoRA the weights of the base, which nothing changes; else None. `params` of a
        state are then the adapters alone, and `whole(params)` is what the model computes with.
      eos_ids: what ends a completion: the tokenizer's EOS, which is the one that is trained, and
        what else the model's directory lists.
    """

    def __init__(self, config: PhaseConfig, mesh: Mesh):
        source = config.model
        where = config.tokenizer_source()
        self.tokenizer: HFTokenizer = load_tokenizer(where)
        listed = () if source.path is None else load_eos_ids(source.path)
        self.eos_ids = stop_ids(self.tokenizer, eos_ids=listed)
        self._mesh, self._source = mesh, source
        self._loaded: Params | None = None
        self.frozen: Params | None = None
        dtype = compute_dtype(source.compute_dtype, mesh.devices.flat[0].platform)
        if source.init is not None:
            shape = {"vocab_size": self.tokenizer.vocab_size} | source.init.model_dump(
                exclude_none=True
            )
            self.model = Model(ModelConfig(**shape), dtype, source.remat, mesh=mesh)
        else:
            assert source.path is not None
            self._load = functools.partial(
                load, source.path, mesh=mesh, compute_dtype=dtype, param_dtype=source.param_dtype,
                remat=source.remat, quantize=source.quantize,
            )  # fmt: skip
            self.model, self._loaded = self._load()
        check_fits(self.tokenizer, self.model.config.vocab_size, where)
        if source.lora is not None:
            self.model = dataclasses.replace(self.model, lora=source.lora)
            self.frozen, self._loaded = self._loaded, None

    @property
    def reference_model(self) -> Model:
        """What computes with `frozen`, if that is there: the model without its adapters."""
        return lora.base(self.model)

    def whole(self, params: Params) -> Params:
        """The parameters that the model computes with, those that do not train included."""
        return params if self.frozen is None else lora.combine(self.frozen, params)

    def init(self, key: Array) -> Params:
        """The weights to start from: those of the directory, or random ones, in their shardings;
        under LoRA new adapters, or those of a directory.

        Arrays of their own each time, for the training step donates what it is given: those that
        were read first are given away, and read once more if they are asked for again.
        """
        if self.frozen is not None:
            axes, _ = lora.split(self.model.logical_axes())
            if self._source.adapter is not None:
                adapters = peft.load(self._source.adapter, self.model)
                return jax.device_put(adapters, shardings(axes, self._mesh, adapters))
            return self._sharded(lora.init, axes, self.frozen, key)
        if self._source.path is not None:
            loaded, self._loaded = self._loaded, None
            return self._load()[1] if loaded is None else loaded
        axes, dtype = self.model.logical_axes(), self._source.param_dtype

        def init(key: Array) -> Params:
            return jax.tree.map(lambda x: x.astype(dtype), self.model.init(key))

        return init_sharded(init, key, shardings(axes, self._mesh))

    def export(self, params: Params, path: Path, **files: Any) -> None:
        """Writes a Hugging Face directory with the tokenizer; it appears whole or not at all.

        Adapters are merged into the weights.

        Args:
          files: `dtype` and `max_shard_bytes`, as of `models.save`.
        """
        model = lora.plain(self.model)
        with appearing(path) as temporary:
            save(temporary, model, self.merged(params), extra_config=self.token_ids, **files)
            if is_first():
                self.tokenizer.save(str(temporary))

    def merged(self, params: Params) -> Params:
        """The parameters of a model without adapters that computes the same."""
        if self.frozen is None:
            return params
        axes = lora.plain(self.model).logical_axes()
        return self._sharded(lora.merge, axes, self.whole(params))

    @property
    def token_ids(self) -> dict[str, Any]:
        """Of the tokenizer, as config.json has them."""
        return {
            "bos_token_id": self.tokenizer.bos_id,
            "eos_token_id": self.eos_ids[0] if len(self.eos_ids) == 1 else [*self.eos_ids],
            "pad_token_id": self.tokenizer.pad_id,
        }

    def export_adapter(self, params: Params, path: Path) -> None:
        """Writes the adapters as a directory of PEFT; it appears whole or not at all.

        Raises:
          UserError: if the model has none.
        """
        if self.frozen is None:
            raise UserError(
                "the run trained all weights (no model.lora), so there is no adapter: export the "
                "model, without --adapter"
            )
        with appearing(path) as temporary:
            peft.save(temporary, self.model, params, base=str(self._source.path))

    def _sharded(self, function: Callable[..., Params], axes: Any, *args: Any) -> Params:
        """`function(model, *args)`, compiled; its result is born in the shardings of `axes`."""
        make = functools.partial(function, self.model)
        targets = shardings(axes, self._mesh, jax.eval_shape(make, *args))
        return jax.jit(make, out_shardings=targets)(*args)


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A directory to write into, which becomes `path` at the end. Processes share it."""
    temporary = path.with_name(f".{path.name}.tmp")
    if is_first():
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
    wait_for_all(f"{path.name} begun")
    yield temporary
    wait_for_all(f"{path.name} written")
    if is_first():
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    wait_for_all(f"{path.name} there")


def score_tokens(
    model: Model,
    params: Params,
    batch: Batch,
    *,
    num_shards: int = 1,
    temperature: float = 1.0,
    with_entropy: bool = True,
    with_log_collision: bool = False,
    dropout_key: Array | None = None,
) -> TokenLogps:
    """Token rows [R, T] -> the policy's log-probs of their targets; see `next_token_logps`.

    Args:
      batch: with `branches` where completions share their prompts.
      num_shards: parts that the rows are split into over devices (`sharding.batch_shards`); a chunk
        of logits has about ROWS_PER_CHUNK rows on each, whatever their number.
      dropout_key: of the adapters' dropout, in training; see `Model.apply`.
    """
    hidden, _ = model.apply(
        params,
        batch["tokens"],
        batch["segment_ids"],
        batch["positions"],
        dropout_key=dropout_key,
        branches=batch.get("branches"),
    )
    return score_hidden(
        model,
        params,
        hidden,
        batch,
        num_shards=num_shards,
        temperature=temperature,
        with_entropy=with_entropy,
        with_log_collision=with_log_collision,
    )


def score_hidden(
    model: Model,
    params: Params,
    hidden: Array,
    batch: Batch,
    *,
    num_shards: int = 1,
    temperature: float = 1.0,
    with_entropy: bool = True,
    with_log_collision: bool = False,
) -> TokenLogps:
    """As `score_tokens`, from the hidden states [R, T, D] of the rows."""
    return next_token_logps(
        hidden,
        model.unembedding(params),
        batch["tokens"],
        batch["mask"],
        temperature=temperature,
        soft_cap=model.config.logit_soft_cap,
        chunk_size=default_chunk_size(batch["tokens"].shape[0] // num_shards),
        with_entropy=with_entropy,
        with_log_collision=with_log_collision,
    )


def checked_rows(rows: int, mesh: Mesh) -> int:
    """The rows of a micro-batch, if they divide over the devices.

    Raises:
      UserError: if they do not divide over the devices along `BATCH_AXES`.
    """
    shards = batch_shards(mesh)
    if rows % shards:
        raise UserError(
            f"{rows} rows in a micro-batch do not divide over {shards} devices (mesh data x fsdp x "
            f"expert); use a multiple of {shards}"
        )
    return rows
