"""Shows what works under the test double: python tests/fake_cuda/smoke.py.

Needs g++ and a torch built for CUDA 13, but no GPU.
"""

import ctypes
import multiprocessing
import os
import sys
import tempfile
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path

BUILT = Path(tempfile.gettempdir()) / "fake_cuda"

if "FAKE_CUDA_DEVICES" not in os.environ:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from fake_cuda import build

    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **build(BUILT, devices=2)})

import pytest  # noqa: E402
import torch  # noqa: E402

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
MIB = 1 << 20
DRIVER = ctypes.CDLL("libcuda.so.1")
RUNTIME = ctypes.CDLL(None)


def devices() -> None:
    assert torch.cuda.is_available() and torch.cuda.device_count() == 2
    first, second = (torch.cuda.get_device_properties(d) for d in range(2))
    assert first.name == "Fake GPU" and (first.major, first.minor) == (9, 0) and first.multi_processor_count == 8
    assert first.uuid != second.uuid
    torch.cuda.set_device(1)
    assert torch.cuda.current_device() == 1 and torch.empty(3, device="cuda").device.index == 1
    torch.cuda.set_device(0)
    torch.cuda.synchronize()
    torch.cuda.synchronize(1)
    assert torch.cuda.can_device_access_peer(0, 1)
    free, total = torch.cuda.mem_get_info()
    assert 0 < free <= total


def copies() -> None:
    host = torch.randn(1000)
    there = host.cuda()
    assert there.is_cuda and torch.equal(there.cpu(), host)
    other = there.to("cuda:1")
    assert other.device.index == 1 and torch.equal(other.cpu(), host)
    there[10:20].copy_(other[20:30])
    assert torch.equal(there[10:20].cpu(), host[20:30])
    assert there[10:].data_ptr() == there.data_ptr() + 40
    assert there.clone()[3].item() == host[3].item()
    del there, other
    torch.cuda.empty_cache()


def fills() -> None:
    for dtype in DTYPES:
        for shape in ((1,), (7, 5), (4096,)):
            assert torch.equal(torch.zeros(shape, dtype=dtype, device="cuda").cpu(), torch.zeros(shape, dtype=dtype))
            assert torch.equal(torch.full(shape, 1, dtype=dtype, device="cuda").cpu(), torch.ones(shape, dtype=dtype))
        there = torch.zeros(20, dtype=dtype, device="cuda")
        there[1:].fill_(1)  # not aligned
        there[::3] = 0  # strided
        expected = torch.ones(20, dtype=dtype)
        expected[::3] = 0
        assert torch.equal(there.cpu(), expected)


def casts_and_strides() -> None:
    for source in DTYPES:
        host = torch.arange(24).remainder(5).to(source).view(2, 3, 4)
        assert torch.equal(host.cuda().permute(2, 0, 1).contiguous().cpu(), host.permute(2, 0, 1))
        for target in DTYPES:
            assert torch.equal(host.cuda().to(target).cpu(), host.to(target)), (source, target)
            assert torch.equal(host.cuda()[:, ::2].to(target).cpu(), host[:, ::2].to(target)), (source, target)


def streams_and_events() -> None:
    there = torch.zeros(100, device="cuda")
    stream = torch.cuda.Stream()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        begin.record()
        there.fill_(2)
        end.record()
    torch.cuda.current_stream().wait_event(end)
    torch.cuda.current_stream().wait_stream(stream)
    there.record_stream(stream)
    end.synchronize()
    stream.synchronize()
    assert end.query() and stream.query() and begin.elapsed_time(end) >= 0
    assert there.cpu().sum() == 200


def pinned() -> None:
    host = torch.full((1000,), 4.0, pin_memory=True)
    assert host.is_pinned() and not torch.ones(1).is_pinned() and torch.ones(3).pin_memory().is_pinned()
    there = torch.empty(1000, device="cuda")
    there.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    host.fill_(0)
    host.copy_(there, non_blocking=True)
    torch.cuda.synchronize()
    assert host.sum() == 4000
    pageable = torch.ones(5000)
    runtime = torch.cuda.cudart()
    assert int(runtime.cudaHostRegister(pageable.data_ptr(), 20000, 0)) == 0 and pageable.is_pinned()
    again = ctypes.c_void_p()
    assert RUNTIME.cudaHostGetDevicePointer(ctypes.byref(again), ctypes.c_void_p(pageable.data_ptr()), 0) == 0
    assert again.value == pageable.data_ptr()
    assert int(runtime.cudaHostUnregister(pageable.data_ptr())) == 0 and not pageable.is_pinned()
    assert RUNTIME.cudaHostGetDevicePointer(ctypes.byref(again), ctypes.c_void_p(pageable.data_ptr()), 0) == 1
    assert RUNTIME.cudaGetLastError() == 1  # torch would find it after its next launch


class Properties(ctypes.Structure):  # CUmemAllocationProp
    _fields_ = (
        *((name, ctypes.c_int) for name in ("type", "handle_types", "location_type", "device")),
        ("unused", ctypes.c_char * 16),
    )


class Access(ctypes.Structure):  # CUmemAccessDesc
    _fields_ = (("location_type", ctypes.c_int), ("device", ctypes.c_int), ("flags", ctypes.c_int))


def mapped(handle: ctypes.c_uint64, size: int, device: int) -> ctypes.c_uint64:
    address = ctypes.c_uint64()
    length = ctypes.c_size_t(size)
    assert DRIVER.cuMemAddressReserve(ctypes.byref(address), length, ctypes.c_size_t(0), ctypes.c_uint64(0), 0) == 0
    assert DRIVER.cuMemMap(address, length, ctypes.c_size_t(0), handle, ctypes.c_uint64(0)) == 0
    assert DRIVER.cuMemSetAccess(address, length, ctypes.byref(Access(1, device, 3)), ctypes.c_size_t(1)) == 0
    return address


def peer(connection: Connection) -> None:
    """The other process: maps what it is sent, reads and answers."""
    descriptor = reduction.recv_handle(connection)
    handle = ctypes.c_uint64()
    assert DRIVER.cuMemImportFromShareableHandle(ctypes.byref(handle), ctypes.c_void_p(descriptor), 1) == 0
    os.close(descriptor)
    address = mapped(handle, 4 * MIB, 1)
    values = (ctypes.c_int * 4).from_address(address.value)  # only here can the host read device memory
    values[1] = values[0] + 1
    properties = Properties()
    assert DRIVER.cuMemGetAllocationPropertiesFromHandle(ctypes.byref(properties), handle) == 0
    connection.send(properties.device)


def virtual_memory() -> None:
    handle, descriptor = ctypes.c_uint64(), ctypes.c_int()
    properties = Properties(type=1, handle_types=1, location_type=1, device=1)
    assert DRIVER.cuMemCreate(ctypes.byref(handle), ctypes.c_size_t(1000), ctypes.byref(properties), 0) == 1
    assert DRIVER.cuMemCreate(ctypes.byref(handle), ctypes.c_size_t(4 * MIB), ctypes.byref(properties), 0) == 0
    assert DRIVER.cuMemExportToShareableHandle(ctypes.byref(descriptor), handle, 1, ctypes.c_uint64(0)) == 0
    address = mapped(handle, 4 * MIB, 1)
    (ctypes.c_int * 4).from_address(address.value)[0] = 41
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=peer, args=(there,))
    process.start()
    reduction.send_handle(here, descriptor.value, process.pid)
    assert here.recv() == 1
    process.join()
    assert (ctypes.c_int * 4).from_address(address.value)[1] == 42
    os.close(descriptor.value)
    assert DRIVER.cuMemRelease(handle) == 0  # the mapping keeps it
    assert DRIVER.cuMemAddressFree(address, ctypes.c_size_t(4 * MIB)) == 1  # still mapped
    assert DRIVER.cuMemUnmap(address, ctypes.c_size_t(4 * MIB)) == 0
    assert DRIVER.cuMemAddressFree(address, ctypes.c_size_t(4 * MIB)) == 0
    assert DRIVER.cuMulticastCreate(None, None) == 801


def graphs() -> None:
    source, target = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
    side = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        target.copy_(source)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            target[:8].fill_(5)
            cast = target.to(torch.int32)
        torch.cuda.current_stream().wait_stream(side)
        target[8:16].zero_()
    assert target.cpu().sum() == 0, "nothing runs before the replay"
    for value in (1, 3):
        source.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert target[:8].cpu().eq(5).all() and target[8:16].cpu().eq(0).all() and target[16:].cpu().eq(value).all()
        assert cast[8:].cpu().eq(value).all()
    with pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.cuda.synchronize()


def unknown_kernels() -> None:
    with pytest.raises(RuntimeError, match="cudaErrorNotSupported"):
        torch.ones(3, device="cuda").cos()
    torch.zeros(3, device="cuda")


SHOWN = (
    devices, copies, fills, casts_and_strides, streams_and_events, pinned, virtual_memory, graphs, unknown_kernels,
)  # fmt: skip

if __name__ == "__main__":
    for shown in SHOWN:
        shown()
        print("works:", shown.__name__, flush=True)
