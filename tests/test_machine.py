"""What the machine grants and can do: CPUs, shared memory for loader processes, bfloat16, a GPU."""
import os
from types import SimpleNamespace

import pytest

import sample
from configs import parse_training
from utils import amp_sc, doctor, machine, provenance


@pytest.fixture
def no_groups(monkeypatch, tmp_path):
    """A machine without control groups; returns the folder to put some into."""
    monkeypatch.setattr(machine, 'CGROUP_TABLE', tmp_path / 'cgroup')
    monkeypatch.setattr(machine, 'CGROUP_ROOT', tmp_path)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(machine.shutil, 'disk_usage', lambda _: SimpleNamespace(free=2 ** 40))
    monkeypatch.delenv('LOCAL_WORLD_SIZE', raising=False)
    return tmp_path


def test_processors_that_the_process_is_bound_to(monkeypatch, no_groups):
    assert machine.available_cpus() == 8
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {3})
    assert machine.available_cpus() == 1
    assert parse_training(['--bs=64']).num_workers(1) == 0  # its own CPU is left to the training


@pytest.mark.parametrize(('table', 'files', 'expected'), [
    ('0::/job\n', {'job/cpu.max': '250000 100000'}, 2),
    ('0::/job/step\n', {'job/step/cpu.max': 'max 100000', 'job/cpu.max': '300000 100000'}, 3),
    ('0::/job\n', {'job/cpu.max': 'max 100000'}, 8),
    ('4:cpu,cpuacct:/job\n', {'cpu,cpuacct/job/cpu.cfs_quota_us': '400000',
                              'cpu,cpuacct/job/cpu.cfs_period_us': '100000'}, 4),
    ('4:cpu:/job\n', {'cpu/job/cpu.cfs_quota_us': '-1', 'cpu/job/cpu.cfs_period_us': '100000'}, 8),
    ('0::/job\n', {'job/cpu.max': '50000 100000'}, 1), ('nonsense\n', {}, 8)])
def test_time_that_control_groups_grant(no_groups, table, files, expected):
    (no_groups / 'cgroup').write_text(table)
    for name, text in files.items():
        (no_groups / name).parent.mkdir(parents=True, exist_ok=True)
        (no_groups / name).write_text(text)
    assert machine.available_cpus() == expected


@pytest.mark.parametrize(('table', 'files', 'expected'), [
    ('', {}, 4096), ('0::/job\n', {'job/memory.max': 'max', 'job/memory.current': '900000'}, 4096),
    ('0::/job/step\n', {'job/memory.max': '900000', 'job/memory.current': '600000',
                        'job/memory.stat': 'anon 100\nactive_file 7\ninactive_file 50000\n'}, 350000 / 1024),
    ('3:memory:/job\n', {'memory/job/memory.limit_in_bytes': '900000',
                         'memory/job/memory.usage_in_bytes': '600000',
                         'memory/job/memory.stat': 'inactive_file 7\ntotal_inactive_file 50000\n'},
     350000 / 1024),
    ('0::/job\n', {'job/memory.max': '900000', 'job/memory.current': '999999'}, 0)])
def test_memory_that_is_left(monkeypatch, no_groups, table, files, expected):
    monkeypatch.setattr(machine, 'MEMORY_INFO', no_groups / 'meminfo')
    assert machine.free_memory() is None
    (no_groups / 'meminfo').write_text('MemTotal:  9999 kB\nMemFree:  77 kB\nMemAvailable:   4096 kB\n')
    (no_groups / 'cgroup').write_text(table)
    for name, text in files.items():
        (no_groups / name).parent.mkdir(parents=True, exist_ok=True)
        (no_groups / name).write_text(text)
    assert machine.free_memory() == expected * 1024


def test_ranks_of_a_machine_share_its_processors(monkeypatch, no_groups):
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    assert parse_training(['--bs=64']).num_workers(2) == 3


def test_shared_memory_that_holds_no_batches(monkeypatch, no_groups):
    config = parse_training(['--bs=96'])
    batch = 96 * 3 * 256 ** 2 * 4
    monkeypatch.setattr(machine.shutil, 'disk_usage', lambda _: SimpleNamespace(free=2 ** 26))  # of docker
    assert config.num_workers(1) == 0
    monkeypatch.setattr(machine.shutil, 'disk_usage', lambda _: SimpleNamespace(free=6 * batch))
    assert config.num_workers(1) == 3
    assert parse_training(['--bs=96', '--workers=5']).num_workers(1) == 5  # as asked


@pytest.mark.parametrize(('num_cpus', 'command'), [
    (1, ': python train.py'), (8, ': OMP_NUM_THREADS=1 torchrun --nproc_per_node=8 train.py')])
def test_doctor_advises_a_process_per_processor(monkeypatch, no_groups, num_cpus, command):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(num_cpus)))
    monkeypatch.setattr(doctor.torch.cuda, 'is_available', lambda: False)
    line, = (line for line in doctor.report() if line.startswith('advice for cpu'))
    assert line.endswith(command)


# ---------------------------------------------------------------------------------------------- bfloat16
@pytest.fixture
def processor(monkeypatch, tmp_path):
    """A processor with these instruction sets, and a torch that has kernels in bfloat16 or not."""
    def have(line, machine_name='x86_64', kernels=True):
        (tmp_path / 'cpuinfo').write_text(f'processor\t: 0\n{line}\n\nprocessor\t: 1\n{line}\n')
        monkeypatch.setattr(machine, 'CPU_INFO', tmp_path / 'cpuinfo')
        monkeypatch.setattr(amp_sc.platform, 'machine', lambda: machine_name)
        monkeypatch.setattr(amp_sc.torch.backends.mkldnn, 'is_available', lambda: kernels)
        monkeypatch.setattr(amp_sc.torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: kernels)
    return have


@pytest.mark.parametrize(('line', 'machine_name', 'kernels', 'expected'), [
    ('flags\t\t: fpu avx2 avx512f', 'x86_64', True, (False, 'lacks amx_bf16 and avx512_bf16')),
    ('flags\t\t: fpu avx512_bf16', 'x86_64', True, (True, 'has avx512_bf16')),
    ('flags\t\t: amx_bf16 avx512_bf16', 'x86_64', True, (True, 'has amx_bf16 and avx512_bf16')),
    ('flags\t\t: amx_bf16 avx512_bf16', 'x86_64', False, (False, 'torch has no kernels')),
    ('Features\t: fp asimd bf16', 'aarch64', True, (True, 'has bf16')),
    ('Features\t: fp asimd', 'aarch64', True, (False, 'lacks bf16')),
    ('', 'x86_64', True, (True, 'torch has kernels')), ('', 'arm64', False, (False, 'torch has no kernels'))])
def test_processors_that_multiply_bfloat16(processor, line, machine_name, kernels, expected):
    processor(line, machine_name, kernels)
    is_fast, reason = amp_sc.bfloat16_on_cpu()
    assert is_fast == expected[0] and expected[1] in reason
    shown, = (line for line in doctor.report() if line.startswith('bf16 on cpu'))
    assert reason in shown and ('--fp16=2' in shown) == (not is_fast)
    note = amp_sc.note_on_bfloat16('cpu', 2, 'precision')
    assert bool(note) == (not is_fast) and '\n' not in note
    assert is_fast or '--precision=0' in note
    assert amp_sc.note_on_bfloat16('cpu', 0, 'fp16') == amp_sc.note_on_bfloat16('cuda', 2, 'fp16') == ''


def test_slow_bfloat16_is_named_once(processor, here, train_here, data, tmp_path, capsys):
    """It is a warning: training and sampling go on."""
    processor('flags\t\t: fpu avx2')
    train_here(tmp_path / 'run', '--ep=1', '--fp16=2')
    assert capsys.readouterr().out.count('--fp16=2 takes many times as long') == 1
    here(sample, f'--ckpt={tmp_path / "run" / "ar-ckpt-last.pth"}', '--num_images=2', '--fp16=2',
         f'--output={tmp_path / "images"}')
    assert capsys.readouterr().out.count('--fp16=2 takes many times as long') == 1


# ---------------------------------------------------------------------------------------------- GPU
@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with these signs of a GPU, and a torch that finds none."""
    def have(device=False, driver='', smi=False, cuda='13.0', visible=None, usable=False):
        monkeypatch.setattr(provenance, 'DEVICES', tmp_path / 'dev')
        monkeypatch.setattr(provenance, 'DRIVER', tmp_path / 'nvidia')
        monkeypatch.setattr(provenance.shutil, 'which', lambda name: f'/usr/bin/{name}' if smi else None)
        monkeypatch.setattr(provenance.torch.cuda, 'is_available', lambda: usable)
        monkeypatch.setattr(provenance.torch.version, 'cuda', cuda)
        monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
        if visible is not None:
            monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
        (tmp_path / 'dev').mkdir()
        (tmp_path / 'dev' / 'nvidiactl').touch()  # no GPU by itself
        if device:
            (tmp_path / 'dev' / 'nvidia0').touch()
        if driver:
            (tmp_path / 'nvidia').mkdir()
            (tmp_path / 'nvidia' / 'version').write_text(driver)
    return have


def test_a_gpu_that_torch_cannot_use_is_named(gpu):
    gpu(device=True, driver='NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27\n')
    line = provenance.unusable_gpu()
    assert 'nvidia0' in line and 'CUDA 13.0' in line and '470.82.01' in line and 'too old' in line
    assert '\n' not in line
    assert any(line in shown for shown in doctor.report())


@pytest.mark.parametrize('signs', [dict(device=True), dict(smi=True), dict(driver='x')], ids=str)
@pytest.mark.parametrize('visible', [None, '0', '0,1', 'GPU-1234'])
def test_any_sign_of_a_gpu_counts(gpu, signs, visible):
    gpu(**signs, cuda=None, visible=visible)
    assert 'is a build without CUDA' in provenance.unusable_gpu()


@pytest.mark.parametrize('signs', [
    dict(), dict(device=True, usable=True), dict(device=True, visible=''), dict(smi=True, visible='-1'),
    dict(device=True, visible='-1,0'), dict(device=True, visible=' ')], ids=str)
def test_no_word_where_there_is_nothing_to_say(gpu, signs):
    gpu(**signs)
    assert provenance.unusable_gpu() == ''
