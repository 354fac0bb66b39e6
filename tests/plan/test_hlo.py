"""Costs counted from HLO against those by hand, of compiled and of written programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from alignjax.core.loops import turning
from alignjax.losses import vocabulary
from alignjax.losses.logprob import next_token_logps
from alignjax.models.kernels.chunked import chunked_attention
from alignjax.plan.hlo import Collective, count
from alignjax.plan.hlo_groups import groups

N = 64
PRODUCT = 2 * N**3
"""FLOPs of a product of two N x N matrices."""


def compiled(function, *shapes, **options):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count(jax.jit(function, **options).lower(*arguments).compile().as_text())


def scanned(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def test_a_scan_of_products_has_all_of_them():
    assert compiled(scanned, (N, N), (7, N, N)).flops == 7 * PRODUCT


def test_its_gradient_has_three_times_as_many():
    costs = compiled(jax.grad(lambda w, x: scanned(x, w).sum()), (5, N, N), (N, N))
    # Of the first layer nothing wants the gradient of x, but a scan computes it all the same.
    assert costs.flops == 3 * 5 * PRODUCT
    assert not costs.unknown_loops and not costs.unknown_kernels


def test_scans_in_scans_multiply():
    def nested(x, w):
        return jax.lax.scan(lambda x, _: (scanned(x, w), None), x, None, length=3)[0]

    assert compiled(nested, (N, N), (4, N, N)).flops == 3 * 4 * PRODUCT


def test_products_of_a_batch_with_other_sizes():
    costs = compiled(lambda x, y: jnp.einsum("bik,bkj->bij", x, y), (3, 8, 32), (3, 32, 16))
    assert costs.flops == 2 * 3 * 8 * 32 * 16
    assert costs.bytes >= 4 * (3 * 8 * 32 + 3 * 32 * 16 + 3 * 8 * 16)


def test_a_loop_that_ends_by_its_data_turns_as_often_as_its_name_says():
    def loop(x, w):
        def go_on(state):
            return state[1].sum() < 100.0

        def body(state):
            return state[0] + 1, jnp.tanh(state[1] @ w)

        with turning(6):
            return jax.lax.while_loop(go_on, body, (0, x))[1]

    named = compiled(loop, (N, N), (N, N))
    assert named.flops == 6 * PRODUCT and not named.unknown_loops

    def bounded(x, w, limit):
        def body(state):
            return state[0] + 2, jnp.tanh(state[1] @ w)

        return jax.lax.while_loop(lambda s: (s[0] < 9) & (s[1].sum() < limit), body, (0, x))[1]

    assert compiled(bounded, (N, N), (N, N), ()).flops == 5 * PRODUCT  # 0, 2, 4, 6, 8
    unnamed = compiled(lambda x, w, n: jax.lax.fori_loop(
        0, n[0].astype(int), lambda _, x: jnp.tanh(x @ w), x), (N, N), (N, N), (1,))  # fmt: skip
    assert unnamed.flops == PRODUCT and len(unnamed.unknown_loops) == 1
    with pytest.raises(ValueError, match="trips=0: expected at least 1"):
        turning(0)


@pytest.mark.parametrize(("most_kept", "products"), [(0, 4), (2**20, 3)])
def test_the_loops_over_chunks_of_logits_are_named(monkeypatch, most_kept, products):
    """Logits, logits again where they are not kept, and what flows back to the two factors."""
    monkeypatch.setattr(vocabulary, "MOST_KEPT", most_kept)
    rows, time, width, vocab = 2, 32, 16, 8 * products  # Shapes of their own: nothing is cached.

    def loss(hidden, unembedding):
        tokens = jnp.ones((rows, time), int)
        mask = jnp.ones((rows, time), bool)
        return next_token_logps(hidden, unembedding, tokens, mask, chunk_size=8).logps.sum()

    gradient = jax.value_and_grad(loss, (0, 1))
    costs = compiled(gradient, (rows, time, width), (width, vocab))
    assert costs.flops == products * 2 * rows * time * width * vocab and not costs.unknown_loops


@pytest.mark.parametrize("keys", [256, 384])
def test_blocks_of_attention_count_as_often_as_they_meet(keys):
    """Blocks of 128: of 2 x 2 the three on and below the diagonal, of 2 x 3 all."""
    queries, width = 256, 16

    def attention(q, k, v):
        segments = jnp.ones((1, queries), int), jnp.ones((1, keys), int)
        return chunked_attention(q, k, v, *segments, scale=1.0, block=128)

    costs = compiled(attention, (1, queries, 1, width), (1, 1, width, keys), (1, 1, width, keys))
    pairs = 3 if keys == queries else 6
    assert costs.flops == 2 * 2 * pairs * 128 * 128 * width and not costs.unknown_loops


def test_the_dearest_branch_counts():
    def branches(which, x):
        return jax.lax.cond(which[0] > 0, lambda: jnp.tanh(x @ x) @ x, lambda: x @ x)

    assert compiled(branches, (1,), (N, N)).flops == 2 * PRODUCT


def test_an_update_in_place_costs_the_update_and_a_slice_the_slice():
    big, row = (1000, N), (1, N)

    def update(x, y, i):
        return jax.lax.dynamic_update_slice(x, 2 * y, (i[0].astype(int), 0))

    costs = compiled(update, big, row, (1,), donate_argnums=0)
    assert costs.bytes < 4 * 4 * N + 100  # What is written, what it is made of, small change.
    costs = compiled(lambda x, i: jax.lax.dynamic_slice(x, (i[0].astype(int), 0), row), big, (1,))
    assert 2 * 4 * N <= costs.bytes < 2 * 4 * N + 100
    costs = compiled(lambda x, i: x[i.astype(int)] * 2, big, (10,))
    assert costs.bytes < 4 * (4 * 10 * N)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def sharded(mesh, function, spec, shape):
    array = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    text = jax.jit(function).lower(array).compile().as_text()
    return lambda **options: count(text, **options).collectives


def test_sums_over_eight_devices_and_over_slices(mesh):
    spec = PartitionSpec(("data", "tensor"))
    total = sharded(mesh, lambda x: x.sum(axis=0), spec, (8, 100))
    size = 4 * 100
    assert total() == [Collective("all-reduce", size, 8)]
    assert total(devices_per_slice=4) == [
        Collective("all-reduce", size, 8, crosses_slices=True, num_slices=2)
    ]
    coords = [(x, y) for x in range(2) for y in range(4)]
    assert total(coords=coords) == [Collective("all-reduce", size, 8, spans=((2, 2), (4, 4)))]


def test_groups_along_one_axis_of_the_mesh(mesh):
    def over(axis):
        def function(x):
            run = jax.shard_map(
                lambda x: jax.lax.all_gather(x, axis, axis=0, tiled=True),
                mesh=mesh, in_specs=PartitionSpec(axis), out_specs=PartitionSpec(),
                axis_names={axis}, check_vma=False,
            )  # fmt: skip
            return run(x)

        return sharded(mesh, function, PartitionSpec(axis), (8, 100))

    whole = 4 * 8 * 100
    coords = [(x, y) for x in range(2) for y in range(4)]
    assert over("tensor")(devices_per_slice=4, coords=coords) == [
        Collective("all-gather", whole, 4, spans=((4, 4),))
    ]
    assert over("data")(devices_per_slice=4, coords=coords) == [
        Collective("all-gather", whole, 2, crosses_slices=True, num_slices=2, spans=((2, 2),))
    ]


def test_a_collective_in_a_loop_and_scatter_and_permute(mesh):
    def of_one(x):
        def body(x, _):
            x = jax.lax.ppermute(x, "tensor", [(i, (i + 1) % 4) for i in range(4)])
            return x * 2, None

        x = jax.lax.scan(body, x, None, length=3)[0]
        return jax.lax.psum_scatter(x, "tensor", scatter_dimension=0, tiled=True)

    run = jax.shard_map(
        of_one, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec("tensor"),
        axis_names={"tensor"}, check_vma=False,
    )  # fmt: skip
    first, second = sharded(mesh, run, PartitionSpec(), (8, 100))()
    size = 4 * 8 * 100
    assert first == Collective("collective-permute", size, 2, times=3)
    assert second == Collective("reduce-scatter", size, 4)


HEAD = "HloModule jit_f, is_scheduled=true, num_partitions=16\n\n"


def entry(*lines, before=""):
    return f"{HEAD}{before}\nENTRY %main (p: f32[4]) -> f32[4] {{\n" + "\n".join(lines) + "\n}\n"


def test_groups_are_read_in_every_form():
    line = "  ROOT %r = f32[4]{{0}} all-reduce(%p), channel_id=1, replica_groups={}, to_apply=%add"
    forms = {
        "{{0,1,2,3},{4,5,6,7}}": 4,
        "{}": 16,
        "[8,2]<=[16]": 2,
        "[4,4]<=[4,4]T(1,0)": 4,
        "mesh['x'=2,'y'=8] {'y'}": 8,
    }
    parameter = "  %p = f32[4]{0} parameter(0)"
    for form, size in forms.items():
        assert count(entry(parameter, line.format(form))).collectives == [
            Collective("all-reduce", 16, size)
        ]
    text = entry(parameter, line.format("[4,4]<=[4,4]T(1,0)"))  # 0, 4, 8, 12 and so on.
    coords = [(n // 4, n % 4) for n in range(16)]
    (found,) = count(text, devices_per_slice=8, coords=coords).collectives
    assert found.spans == ((4, 4),) and found.num_slices == 2
    with pytest.raises(ValueError, match="no replica_groups of a known form in: , channel_id=1"):
        count(entry(parameter, line.format("nobody")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mesh['x'=2,'y'=3] {'y'}", [[0, 1, 2], [3, 4, 5]]),
        ("mesh['x'=2,'y'=3] {'x'}", [[0, 3], [1, 4], [2, 5]]),
        ("mesh['x'=2,'y'=2] {'x','y'}", [[0, 1, 2, 3]]),
        ("mesh['x'=8] {'x':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['x'=8] {'x':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['x'=2,'y'=2], device_ids=(0,2,1,3) {'y'}", [[0, 2], [1, 3]]),
        ("mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'x'}", [[0, 1], [2, 3]]),
        ("[2,3]<=[3,2]T(1,0)", [[0, 2, 4], [1, 3, 5]]),
    ],
)
def test_groups_of_iota_and_of_axes(text, expected):
    assert groups(f", channel_id=1, replica_groups={text}, dimensions={{0}}", 8) == expected


def test_starts_count_once_and_what_lies_in_vmem_is_free():
    text = entry(
        "  %p = f32[4]{0:T(128)} parameter(0)",
        "  %s = (f32[4]{0:T(128)S(1)}, f32[4]{0:T(128)}, u32[]{:S(2)}) copy-start(%p)",
        "  %d = f32[4]{0:T(128)S(1)} copy-done(%s)",
        "  %m = f32[4]{0:T(128)S(1)} multiply(%d, %d)",
        "  %gs = (f32[4]{0:T(128)S(1)}, f32[16]{0:T(128)}) all-gather-start(%m), dimensions={0},"
        " replica_groups=[4,4]<=[16]",
        "  %gd = f32[16]{0:T(128)} all-gather-done(%gs)",
        "  ROOT %r = f32[4]{0} slice(%gd), slice={[0:4]}",
    )
    costs = count(text)
    assert costs.collectives == [Collective("all-gather", 64, 4)]
    assert (
        costs.bytes == 16 + 64 + 2 * 16
    )  # The copy reads, the gather writes, the slice does both.


def test_transfers_between_slices_of_tpus():
    attributes = (
        "channel_id=2, is_host_transfer=true, frontend_attributes={"
        '_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_megascale_target="{1,2}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    text = entry(
        "  %p = f32[4]{0} parameter(0)",
        "  %t = token[] after-all()",
        f"  %s = (f32[4]{{0}}, u32[], token[]) send(%p, %t), {attributes}",
        f"  %c = (f32[4]{{0}}, u32[], token[]) recv(%t), {attributes}",
        "  %sd = token[] send-done(%s), channel_id=2",
        "  %cd = (f32[4]{0}, token[]) recv-done(%c), channel_id=1",
        "  ROOT %r = f32[4]{0} get-tuple-element(%cd), index=0",
    )
    assert count(text).collectives == [
        Collective("all-reduce", 16, 2, crosses_slices=True, num_slices=2)
    ]


FUSED = """
%gather_start (a: f32[4]) -> (f32[4], f32[16], u32[]) {
  %a = f32[4]{0} parameter(0)
  %g = f32[16]{0} all-gather(%a), channel_id=7, replica_groups=[4,4]<=[16], \
frontend_attributes={chain_id="1"}
  ROOT %c = (f32[4]{0}, f32[16]{0}, u32[]{:S(2)}) custom-call(%g), \
custom_call_target="AsyncCollectiveStart"
}

%gather_on (a: f32[4], b: f32[16], u: u32[], x: f32[8,8]) -> (f32[8,8], f32[4], f32[16]) {
  %a = f32[4]{0} parameter(0)
  %b = f32[16]{0} parameter(1)
  %u = u32[]{:S(2)} parameter(2)
  %x = f32[8,8]{1,0} parameter(3)
  %v = f32[8,8]{1,0} convolution(%x, %x), dim_labels=bf_io->bf
  %g = f32[16]{0} all-gather(%a), channel_id=7, replica_groups=[4,4]<=[16], \
frontend_attributes={chain_id="1"}
  ROOT %t = (f32[8,8]{1,0}, f32[4]{0}, f32[16]{0}) tuple(%v, %a, %g)
}

%all-reduce-scatter.1 (y: f32[8,8]) -> f32[2,8] {
  %y = f32[8,8]{1,0} parameter(0)
  %r = f32[8,8]{1,0} all-reduce(%y), channel_id=10, replica_groups=[4,4]<=[16], to_apply=%add
  %i = u32[] constant(0)
  ROOT %w = f32[2,8]{1,0} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={2,8}
}
"""


def test_collectives_that_tpus_fuse_with_products():
    text = entry(
        "  %p = f32[4]{0} parameter(0)",
        "  %x = f32[8,8]{1,0} parameter(1)",
        "  %s = (f32[4]{0}, f32[16]{0}, u32[]{:S(2)}) fusion(%p), kind=kCustom,"
        " calls=%gather_start",
        "  %b = f32[16]{0} get-tuple-element(%s), index=1",
        "  %u = u32[]{:S(2)} get-tuple-element(%s), index=2",
        "  %o = (f32[8,8]{1,0}, f32[4]{0}, f32[16]{0}) fusion(%p, %b, %u, %x), kind=kCustom,"
        " calls=%gather_on",
        "  %v = f32[8,8]{1,0} get-tuple-element(%o), index=0",
        "  ROOT %r = f32[2,8]{1,0} fusion(%v), kind=kCustom, calls=%all-reduce-scatter.1",
        before=FUSED,
    )
    costs = count(text)
    assert costs.collectives == [
        Collective("all-gather", 64, 4), Collective("reduce-scatter", 256, 4),
    ]  # fmt: skip
    assert costs.flops == 2 * 8**3
    # The gather reads and writes; the product reads x and writes; the reduction reads and writes.
    assert costs.bytes == (16 + 64) + (256 + 256) + (256 + 64)


def test_products_that_tpus_write_as_convolutions():
    """4 x 8 products of [128, 64] and [64, 256], the batch as dimensions of the window."""
    line = (
        "  ROOT %c = bf16[4,8,128,256]{3,2,1,0} convolution(%q, %k), window={size=4x8 stride=3x7"
        " lhs_dilate=4x8}, dim_labels=01bf_01oi->01bf"
    )
    text = entry(
        "  %q = bf16[4,8,128,64]{3,2,1,0} parameter(0)",
        "  %k = bf16[4,8,256,64]{3,2,1,0} parameter(1)",
        line,
    )
    costs = count(text)
    assert costs.flops == 2 * 4 * 8 * 128 * 64 * 256
    assert costs.bytes == 2 * (4 * 8) * (128 * 64 + 256 * 64 + 128 * 256)


def test_a_convolution_leaves_out_the_padding():
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (2,), [(1, 1)], dimension_numbers=("NWC", "WIO", "NWC")
        )

    x, w = np.zeros((3, 8, 5), np.float32), np.zeros((3, 5, 7), np.float32)
    text = entry(
        "  %x = f32[3,8,5]{2,1,0} parameter(0)",
        "  %w = f32[3,5,7]{2,1,0} parameter(1)",
        "  ROOT %c = f32[3,4,7]{2,1,0} convolution(%x, %w), window={size=3 stride=2 pad=1_1},"
        " dim_labels=b0f_0io->b0f",
    )
    # Outputs start at -1, 1, 3, 5: the first one misses an element, the others have three.
    assert convolve(x, w).shape == (3, 4, 7)
    assert count(text).flops == 2 * 3 * 5 * 7 * (2 + 3 + 3 + 3)


def kernel(name, attributes, table="1,2,2", keys=1024):
    operands = "%m, %m, %q, %k, %k"
    return entry(
        f"  %m = s8[{table}]{{2,1,0}} parameter(0)",
        "  %q = bf16[2,2,1024,128]{3,2,1,0} parameter(1)",
        f"  %k = bf16[2,1,{keys},128]{{3,2,1,0}} parameter(2)",
        f"  ROOT %{name} = bf16[2,2,1024,128]{{3,2,1,0}} custom-call({operands}), "
        f'custom_call_target="tpu_custom_call", {attributes}',
    )


@pytest.mark.parametrize(("name", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4)])
def test_splash_attention_by_its_blocks(name, products):
    """Two blocks of 512 along each axis: three of the four pairs are on or below the diagonal."""
    attributes = 'frontend_attributes={kernel_metadata={\n"xprof_metadata":"{}"\n}}, metadata={}'
    costs = count(kernel(f"splash_mha_{name}_segmented.1", attributes))
    assert costs.flops == products * 2 * (2 * 2) * (3 * 512 * 512) * 128
    assert not costs.unknown_kernels


@pytest.mark.parametrize(
    ("name", "products", "table", "pairs"),
    [
        ("fwd", 2, "1,2,8", 9),
        ("dkv", 4, "1,2,8", 9),
        ("dq", 3, "1,2,3", 21 / 4),
        ("dkv", 4, "1,1,8", 2),
    ],
)
def test_splash_attention_of_a_share_of_the_queries(name, products, table, pairs):
    """Two of eight blocks of queries: of the 36 pairs on or below the diagonal a quarter; and of
    the 21, or 8, within windows."""
    costs = count(kernel(f"splash_mha_{name}_segmented.1", "metadata={}", table, 4096))
    assert costs.flops == products * 2 * (2 * 2) * (pairs * 512 * 512) * 128


def test_kernels_say_their_cost_or_are_named():
    stated = 'backend_config={"custom_call_config":{"cost_estimate":{"flops":"268435456"}}}'
    assert count(kernel("ragged-dot-none", stated)).flops == 268435456
    costs = count(kernel("mine.3", "metadata={}"))
    assert costs.flops == 0 and costs.unknown_kernels == ["mine.3"]


def test_a_peeled_loop_starts_where_its_tuple_says():
    loop = """
%body (p: (s32[], f32[8,8], s32[])) -> (s32[], f32[8,8], s32[]) {
  %p = (s32[], f32[8,8]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %c = s32[]{:S(6)} copy(%i)
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=1
  %one = s32[] get-tuple-element(%p), index=2
  %n = s32[] add(%c, %one)
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[8,8]{1,0}, s32[]) tuple(%n, %y, %one)
}

%condition (p: (s32[], f32[8,8], s32[])) -> pred[] {
  %p = (s32[], f32[8,8]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %limit = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}
"""
    lines = (
        "  %x = f32[8,8]{1,0} parameter(0)",
        "  %one = s32[] constant(1)",
        "  %first = s32[] copy(%one)",
        "  %t = (s32[], f32[8,8]{1,0}, s32[]) tuple(%first, %x, %one)",
        "  %w = (s32[], f32[8,8]{1,0}, s32[]) while(%t), condition=%condition, body=%body",
        "  ROOT %r = f32[8,8]{1,0} get-tuple-element(%w), index=1",
    )
    assert count(entry(*lines, before=loop)).flops == 4 * 2 * 8**3
    for direction, trips in (("LE", 5), ("NE", 4)):
        other = loop.replace("direction=LT", f"direction={direction}")
        assert count(entry(*lines, before=other)).flops == trips * 2 * 8**3
    unknown = count(entry(*lines, before=loop.replace("direction=LT", "direction=GT")))
    assert unknown.unknown_loops == ["w"]


def test_what_is_no_hlo_says_so():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        count("module @jit_f {}")
    with pytest.raises(ValueError, match="'x12' is no type"):
        count(entry("  ROOT %p = x12[4]{0} parameter(0)"))
