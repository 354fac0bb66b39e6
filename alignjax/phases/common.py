"""What every phase has: a model with its tokenizer, text turned into ids, and an export."""

import shutil
from pathlib import Path
from typing import Literal, Self

import jax
from jax import Array
from jax.sharding import Mesh
from pydantic import Field, model_validator

from alignjax.core.config import Config, DirectoryName
from alignjax.core.errors import UserError
from alignjax.core.precision import compute_dtype
from alignjax.core.types import Params
from alignjax.losses import TokenLogps, next_token_logps
from alignjax.losses.vocabulary import default_chunk_size
from alignjax.models import Model, ModelConfig, load, load_eos_ids, save
from alignjax.sharding import MeshConfig, batch_shards, init_sharded, shardings
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

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.path is None) == (self.init is None):
            raise ValueError("give either path (a directory) or init (a shape to start from)")
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


class Policy:
    """A model that is trained, its tokenizer, and where its weights come from.

    Attributes:
      eos_ids: what ends a completion: the tokenizer's EOS, which is the one that is trained, and
        what else the model's directory lists.
    """

    def __init__(self, config: PhaseConfig, mesh: Mesh):
        source = config.model
        where = config.tokenizer or source.path
        if where is None:
            raise UserError(
                "tokenizer: a model to be created (model.init) needs a tokenizer's directory"
            )
        self.tokenizer: HFTokenizer = load_tokenizer(where)
        listed = () if source.path is None else load_eos_ids(source.path)
        self.eos_ids = stop_ids(self.tokenizer, eos_ids=listed)
        self._mesh, self._source = mesh, source
        self._loaded: Params | None = None
        dtype = compute_dtype(source.compute_dtype, mesh.devices.flat[0].platform)
        if source.init is not None:
            shape = {"vocab_size": self.tokenizer.vocab_size} | source.init.model_dump(
                exclude_none=True
            )
            self.model = Model(ModelConfig(**shape), dtype, source.remat, mesh=mesh)
        else:
            assert source.path is not None
            self.model, self._loaded = load(
                source.path, mesh=mesh, compute_dtype=dtype, param_dtype=source.param_dtype,
                remat=source.remat,
            )  # fmt: skip
        check_fits(self.tokenizer, self.model.config.vocab_size, where)

    def init(self, key: Array) -> Params:
        """The weights to start from: those of the directory, or random ones, in their shardings.

        A fresh copy each time: the training step donates what it is given.
        """
        if self._loaded is not None:
            return copied(self._loaded)
        axes, dtype = self.model.logical_axes(), self._source.param_dtype

        def init(key: Array) -> Params:
            return jax.tree.map(lambda x: x.astype(dtype), self.model.init(key))

        return init_sharded(init, key, shardings(axes, self._mesh))

    def export(self, params: Params, path: Path) -> None:
        """Writes a Hugging Face directory with the tokenizer; it appears whole or not at all."""
        temporary = path.with_name(f".{path.name}.tmp")
        if temporary.exists():
            shutil.rmtree(temporary)
        save(
            temporary,
            self.model,
            params,
            extra_config={
                "bos_token_id": self.tokenizer.bos_id,
                "eos_token_id": self.eos_ids[0] if len(self.eos_ids) == 1 else [*self.eos_ids],
                "pad_token_id": self.tokenizer.pad_id,
            },
        )
        self.tokenizer.save(str(temporary))
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)


def copied(params: Params) -> Params:
    """Other buffers with the same content in the same shardings; compiles nothing."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding, may_alias=False), params)


def score_tokens(
    model: Model,
    params: Params,
    batch: Batch,
    *,
    num_shards: int = 1,
    temperature: float = 1.0,
    with_entropy: bool = True,
) -> TokenLogps:
    """Token rows [R, T] -> the policy's log-probs of their targets; see `next_token_logps`.

    Args:
      num_shards: parts that the rows are split into over devices (`sharding.batch_shards`); a chunk
        of logits has about ROWS_PER_CHUNK rows on each, whatever their number.
    """
    hidden, _ = model.apply(params, batch["tokens"], batch["segment_ids"], batch["positions"])
    return next_token_logps(
        hidden,
        model.unembedding(params),
        batch["tokens"],
        batch["mask"],
        temperature=temperature,
        soft_cap=model.config.logit_soft_cap,
        chunk_size=default_chunk_size(batch["tokens"].shape[0] // num_shards),
        with_entropy=with_entropy,
    )


def rows_per_process(rows: int, mesh: Mesh) -> int:
    """This process's share of the rows of a micro-batch.

    Raises:
      UserError: if they do not divide over the devices along data and fsdp.
    """
    shards = batch_shards(mesh)
    if rows % shards:
        raise UserError(
            f"{rows} rows in a micro-batch do not divide over {shards} devices (mesh data x fsdp); "
            f"use a multiple of {shards}"
        )
    return rows // jax.process_count()
