"""How programs of the Hopper kernels share out tiles, and how launches that overlap wait for one another.

A launch of the next branch may begin when programs of this one have ended. What a tile needs of the launches before is
told by counters in global memory: who writes counts when all of it has arrived, who reads waits for the count. A waiting
program never keeps those from running that it waits for: a launch's programs begin after all of the one before have.
Programs that may have begun early end by waiting for all launches before: these still draw when their last tile is
counted, and what comes after may use the counters' memory for something else.
"""

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
except ImportError as error:
    raise ImportError("the Hopper kernels need Gluon, which comes with triton") from error


@gluon.jit
def _let_next_start():
    """Let programs of the next launch start where this one's have ended; they wait for what they need."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def _await_grids_before():
    """Wait until all launches before have ended, so that what waits for this one waits for them, too."""
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _draw(ptr):
    """Take the next number of a counter."""
    return gl.atomic_add(ptr, 1, sem="relaxed", scope="gpu")


@gluon.jit
def _start_drawing(ptr):
    """Ask for the next number of a counter, for a warp by itself; ``_drawn`` waits for it."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred first; .reg .b32 lane; mov.u32 lane, %laneid; setp.eq.u32 first, lane, 0; mov.b32 $0, 0; "
        "@first atom.relaxed.gpu.global.add.u32 $0, [$1], 1; }",
        "=r,l", [ptr], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _drawn(number):
    """Tell all lanes the number that was asked for."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _count(ptr, more):
    """Count on, after all that was written before; whole warps call."""
    gl.atomic_add(ptr, more, sem="release", scope="gpu")


@gluon.jit
def _look(ptr):
    """Read a word that another program may write; what it has written before is seen, too."""
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [ptr], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _glance(ptr):
    """Read a word that another program may write, for less; who needs what was written before has to look then, too."""
    return gl.inline_asm_elementwise(
        "ld.relaxed.gpu.global.b32 $0, [$1];", "=r,l", [ptr], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _tell(ptr, value):
    """Write a word that another program may wait for, after all that was written before."""
    gl.inline_asm_elementwise(
        "st.release.gpu.global.b32 [$1], $2; mov.b32 $0, $2;", "=r,l,r", [ptr, value], dtype=gl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@gluon.jit
def _await_count(ptr, count):
    """Wait until a counter has come so far; what has been written before that is seen."""
    if count > 0:
        while _look(ptr) < count:
            pass


@gluon.jit
def _fence_global():
    """Let the copy engine come after what this thread has seen."""
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def _await_written():
    """Wait until what the copy engine writes, or adds, is in global memory, not just read: every lane."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; bar.warp.sync -1; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip
