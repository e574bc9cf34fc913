"""What is read in the text of a compiled program."""

import hlo_text

COMPILED = """\
HloModule m

%compare (a: f32[], b: f32[]) -> pred[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %less = pred[] compare(%a, %b), direction=LT
}

%fused (p0: f32[64], p1: s32[100,1], p2: f32[100]) -> f32[64] {
  %p0 = f32[64]{0} parameter(0)
  %p1 = s32[100,1]{1,0} parameter(1)
  %p2 = f32[100]{0} parameter(2)
  ROOT %scatter.1 = f32[64]{0} scatter(%p0, %p1, %p2), update_window_dims={}, to_apply=%compare
}

%beside (p: f32[64]) -> f32[32] {
  %p.1 = f32[64]{0} parameter(0)
  ROOT %slice.1 = f32[32]{0} slice(%p.1), slice={[0:32]}
}

%body (t: (f32[64])) -> (f32[64]) {
  %t = (f32[64]{0}) parameter(0)
  %x = f32[64]{0} get-tuple-element(%t), index=0
  %scatter_fusion = f32[64]{0} fusion(%x, %i, %u), kind=kCustom, calls=%fused
  %sort.1 = (f32[64]{0:T(128)}, s32[64]{0}) sort(%scatter_fusion, %iota), to_apply=%compare
  %gather.1 = f32[10,4]{1,0} gather(%x, %n), slice_sizes={1,4}, metadata={op_name="a/b"}
  %ahead = ((f32[64]{0}), f32[32]{0}, u32[]) async-start(%x), calls=%beside
  %ready = f32[32]{0} async-done(%ahead), calls=%beside
  %scalar = f32[]{:T(128)S(6)} add(%c, %c)
  %add = f32[64]{0} add(%x, %x), backend_config={"estimated_cycles":"1825"}
  %ar = (f32[8]{0}, s32[2,2]{1,0}) all-reduce(%x, %y), replica_groups={{0,1}}
  ROOT %out = (f32[64]{0}) tuple(%add)
}

ENTRY %main (p: f32[64]) -> f32[64] {
  %p = f32[64]{0} parameter(0)
  %w = (f32[64]{0}) while(%start), condition=%c, body=%body
  ROOT %r = f32[64]{0} get-tuple-element(%w), index=0
}
"""


def test_reading_a_compiled_program():
    kernels = {(k.opcode, k.cycles, k.loops) for k in hlo_text.kernels(COMPILED)}
    assert kernels == {("fusion", None, 1), ("sort", None, 1), ("gather", None, 1), ("add", 1825, 1)}
    entries = {(o.opcode, o.entries, o.loops, o.source) for o in hlo_text.one_by_one(COMPILED)}
    assert entries == {("scatter", 100, 1, ""), ("sort", 64, 1, ""), ("gather", 10, 1, "a/b")}
    sent = [(c.opcode, c.dtype, c.shape, c.bytes, c.loops) for c in hlo_text.collectives(COMPILED)]
    assert sent == [("all-reduce", "f32", (8,), 32, 1), ("all-reduce", "s32", (2, 2), 16, 1)]
