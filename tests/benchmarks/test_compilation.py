"""The widths of a kernel's global accesses, read out of its PTX."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks.compilation import access_widths

PTX = """
.visible .entry add_k(
	.param .u64 .ptr .global .align 1 add_k_param_0,
	.param .u32 add_k_param_1,
	.param .u64 .ptr .global .align 1 add_k_param_2,
	.param .u64 .ptr .global .align 1 add_k_param_3
)
{
	ld.param.b64 	%rd1, [add_k_param_0];
	ld.param.b32 	%r1, [add_k_param_1];
	ld.param.b64 	%rd2, [add_k_param_2];
	ld.param.b64 	%rd3, [add_k_param_3];
	mov.u32 	%r2, %tid.x;
	mad.lo.s32 	%r3, %r2, %r1, %r1;
	mad.wide.s32 	%rd4, %r3, 2, %rd1;
	// begin inline asm
	@%p1 ld.global.v4.b32 { %r10, %r11, %r12, %r13 }, [ %rd4 + 0 ];
	// end inline asm
$L__BB0_2:
	add.s64 	%rd5, %rd6, %rd2;
	ld.global.nc.L1::evict_last.b16 	%rs1, [%rd5];
	ld.global.v2.b64 	{%rd20, %rd21}, [%rd4+16];
	cp.async.cg.shared.global [ %r30 + 0 ], [ %rd4 + 0 ], 0x10, %r31;
	mov.b64 	%rd7, %rd3;
	@!%p2 st.global.b32 [ %rd7 + 0 ], { %r10 };
	@%p1 bra 	$L__BB0_2;
	st.shared.v4.b32 	[%r30], {%r10, %r11, %r12, %r13};
"""


def test_widths_by_pointer() -> None:
    loads, stores = access_widths(PTX, ["x_ptr", "stride", "weight_ptr", "y_ptr"])
    assert loads == {"x_ptr": (16,), "weight_ptr": (2,)}
    assert stores == {"y_ptr": (4,)}


def test_a_narrow_access_beside_wide_ones_is_seen() -> None:
    narrow = PTX.replace("ld.global.v2.b64 	{%rd20, %rd21}", "ld.global.b32 	%r40")
    loads, _ = access_widths(narrow, ["x_ptr", "stride", "weight_ptr", "y_ptr"])
    assert loads["x_ptr"] == (4, 16)
