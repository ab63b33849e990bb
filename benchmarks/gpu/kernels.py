"""The probes: kernels that say which SMs they ran on, take time, or count; as PTX text.

probe(bitmap, cycles): each block sets its SM's bit and spins. cluster_probe: the same, compiled for
clusters of two blocks. tick(cell, amount): adds to a 64-bit cell.
"""

PARAMETERS = {"probe": (8, 8), "cluster_probe": (8, 8), "tick": (8, 8)}
"""Bytes of each kernel's parameters."""

BITMAP_BYTES = 64
"""A bit for each of 512 SMs."""

_PROBE = """
.visible .entry NAME(.param .u64 bitmap, .param .u64 cycles) CLUSTER
{
    .reg .pred %p<3>;
    .reg .b32 %r<8>;
    .reg .b64 %rd<9>;
    ld.param.u64 %rd1, [bitmap];
    ld.param.u64 %rd2, [cycles];
    cvta.to.global.u64 %rd3, %rd1;
    mov.u32 %r1, %tid.x;
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra WAIT;
    mov.u32 %r2, %smid;
    shr.u32 %r3, %r2, 5;
    and.b32 %r4, %r2, 31;
    mov.u32 %r5, 1;
    shl.b32 %r6, %r5, %r4;
    mul.wide.u32 %rd4, %r3, 4;
    add.s64 %rd5, %rd3, %rd4;
    red.global.or.b32 [%rd5], %r6;
WAIT:
    mov.u64 %rd6, %clock64;
AGAIN:
    mov.u64 %rd7, %clock64;
    sub.s64 %rd8, %rd7, %rd6;
    setp.lt.u64 %p2, %rd8, %rd2;
    @%p2 bra AGAIN;
    ret;
}
"""

_TICK = """
.visible .entry tick(.param .u64 cell, .param .u64 amount)
{
    .reg .pred %p<2>;
    .reg .b32 %r<2>;
    .reg .b64 %rd<6>;
    ld.param.u64 %rd1, [cell];
    ld.param.u64 %rd2, [amount];
    cvta.to.global.u64 %rd3, %rd1;
    mov.u32 %r1, %tid.x;
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra DONE;
    ld.global.u64 %rd4, [%rd3];
    add.s64 %rd5, %rd4, %rd2;
    st.global.u64 [%rd3], %rd5;
DONE:
    ret;
}
"""


def ptx(with_clusters: bool) -> str:
    """All probes as PTX; the one for clusters needs a GPU of capability 9.0."""
    target = "sm_90" if with_clusters else "sm_80"
    text = f".version 7.8\n.target {target}\n.address_size 64\n"
    text += _PROBE.replace("NAME", "probe").replace("CLUSTER", "") + _TICK
    if with_clusters:
        clusters = ".explicitcluster .reqnctapercluster 2, 1, 1"
        text += _PROBE.replace("NAME", "cluster_probe").replace("CLUSTER", clusters)
    return text
