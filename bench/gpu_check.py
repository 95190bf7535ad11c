"""Everything that only a GPU can show, in one command of a few minutes, without downloads:

    python -m bench.gpu_check --out=bench/results

1. reference vectors in float32, which the GPU must reproduce within stated tolerances;
2. images/s, peak memory and attention kernels of VAR-d16 at 256 px in bf16 and fp16, and of FlowAR-S in TF32
   and bf16, both with random weights, and what FlowAR saves of sampling time and of memory;
3. NCCL with one process.

To try the script without a GPU: `--device=cpu --depth=1 --batch=2`.
Letters: B batch, K scales, L all tokens, l tokens of one scale, C width, V vocabulary, Z tokenizer channels.
"""
import argparse
import copy
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import dist
from bench.common import seconds_of, synchronize
from bench.published_solver import both_halves
from configs import PRESETS, FlowARConfig
from models import NPP, VAR, VQVAE, ARModel, FlexVAR, FlowAR, VectorQuantizer2, build_loss, build_vae_var
from models.helpers import filter_top_k_top_p
from models.noise import ImageNoise
from models.recompute import set_recompute
from tests.vectors import (
    VARIANTS,
    GivenNoise,
    Latents,
    given_noise,
    load_json,
    load_tensors,
    pixels,
    stored_state,
    tiny_flexvar,
    tiny_flowar,
    tiny_npp,
    tiny_vqvae,
    uniform_images,
    var_state,
)
from trainer import GeneratorTrainer, TokenizerTrainer
from training.build import model_arguments
from utils.amp_sc import AmpOptimizer
from utils.doctor import report
from utils.lr_control import filter_params, lr_wd_annealing
from utils.misc import allow_tf32

# names of attention kernels, as the profiler shows them
KERNEL = re.compile(r'flash|fmha|attention|attn|cutlassF|efficient', re.IGNORECASE)
PRECISIONS = dict(tf32=0, fp16=1, bf16=2)  # in the unit of `AmpOptimizer`


# ---------------------------------------------------------------------------------------------- vectors
class Vectors:
    """Compares this device with the stored vectors of the published code.

    Attributes:
        rows: by group, the largest absolute error, its tolerance (0: must be exact) and how often it was
            compared. For integers the error is the number of differences.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.rows: dict[str, dict] = {}
        self.vae = tiny_vqvae().to(device)

    def compare(self, group: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
        """Note the error of a tensor on any device."""
        actual = actual.detach().cpu()
        expected = expected.cpu()
        if actual.is_floating_point():
            error = (actual - expected).abs().max().item()
        else:
            error = float((actual != expected).sum())
        row = self.rows.setdefault(group, dict(error=0., tolerance=tolerance, compared=0))
        row['error'] = max(row['error'], error)
        row['compared'] += 1

    def relative(self, group: str, actual: float, expected: float, tolerance: float) -> None:
        """Note the relative error of a number."""
        self.compare(group, torch.tensor(actual / expected), torch.tensor(1.), tolerance)

    def var(self, variant: str, **overrides) -> VAR:
        """A VAR with stored weights on the device, in eval mode."""
        config = load_json(f'var/var_{variant}')['config'] | overrides
        with torch.device(self.device):
            var = VAR(self.vae, **config)
        var.load_state_dict(var_state(variant))
        return var.eval()

    def tokenizer(self) -> None:
        """VQVAE from pixels to codes and back, and every variant of its quantizer."""
        vectors = load_tensors('var/vqvae')
        x = pixels(vectors['images_u8']).to(self.device)
        self.compare('vqvae features', self.vae.features(x), vectors['feat'], 1e-4)
        idx_kBl = self.vae.encode(x)
        for k, idx_Bl in enumerate(idx_kBl):
            self.compare('vqvae codes', idx_Bl, vectors[f'idx.{k}'], 0)
        self.compare('vqvae images', self.vae.decode(idx_kBl), vectors['rec.last'], 2e-4)
        teacher_BLZ = self.vae.quantize.idxBl_to_var_input(idx_kBl)
        self.compare('vqvae teacher input', teacher_BLZ, vectors['var_input'], 1e-4)

        info = load_json('var/quantizer_variants')
        vectors = load_tensors('var/quantizer_variants')
        for name, variant in info['variants'].items():
            quantizer = VectorQuantizer2(**info['config'] | variant['kwargs'])
            quantizer.load_state_dict(stored_state(variant['state'], quantizer))
            quantizer.to(self.device).eval()
            feat = vectors['feat'].to(self.device)
            codes = torch.cat(quantizer.f_to_idxBl_or_fhat(feat, to_fhat=False), dim=1)
            self.compare('quantizer codes', codes, vectors[f'{name}.idx'], 0)
            self.compare('quantizer f_hat', quantizer.f_to_idxBl_or_fhat(feat, to_fhat=True)[-1],
                         vectors[f'{name}.fhat_last'], 1e-5)

    def transformer(self) -> None:
        """VAR: teacher-forced logits, the loss and the gradient of every parameter."""
        for variant in VARIANTS:
            info = load_json(f'var/var_{variant}')
            vectors = load_tensors(f'var/var_{variant}')
            var = self.var(variant)
            labels, teacher, target = (vectors[key].to(self.device) for key in ('labels', 'var_input', 'gt'))
            logits_BLV = var(labels, teacher)
            self.compare('var logits', logits_BLV, vectors['logits_eval'], 5e-4)
            loss = torch.nn.functional.cross_entropy(logits_BLV.transpose(1, 2), target)
            loss.backward()
            stored = info['losses']['ls0.0']
            self.relative('var loss', loss.item(), stored['loss'], 1e-5)
            for name, parameter in var.named_parameters():
                norm = stored['grad_l2'][name]
                if norm > 1e-6:  # a smaller one is rounding
                    self.relative('var gradients', parameter.grad.norm().item(), norm, 1e-3)

    def sampling(self) -> None:
        """VAR: greedy sampling, filters of logits, and noise that must not depend on the device."""
        vectors = load_tensors('var/sampling')
        for case in load_json('var/sampling')['cases']:
            if not case['rng_independent']:
                continue  # CPU and CUDA generators differ
            var = self.var(case['model'])
            labels = var.as_labels(case['label_B'], case['B'], None)
            steps = list(var.sample_scales(labels, cfg=case['cfg'], top_k=case['top_k'], top_p=case['top_p'],
                                           more_smooth=case['more_smooth']))
            self.compare('sampled codes', torch.cat([step.idx_Bl for step in steps], dim=1),
                         vectors[f'{case["key"]}.tokens'], 0)
            self.compare('sampled f_hat', steps[-1].f_hat, vectors[f'{case["key"]}.fhat'], 5e-4)
        vectors = load_tensors('var/topk_topp')
        for case in load_json('var/topk_topp')['cases']:
            if not case['order_dependent_ties']:
                logits = vectors[case['input']].to(self.device)
                kept = filter_top_k_top_p(logits, case['top_k'], case['top_p']).isfinite()
                self.compare('filters', kept, vectors[f'{case["key"]}.keep'], 0)

        on_cpu = torch.empty(2, 7, 96)
        on_device = on_cpu.to(self.device)
        expected = ImageNoise(5, [3, 9]).exponential_like(on_cpu)
        actual = ImageNoise(5, [3, 9]).exponential_like(on_device)
        self.compare('noise by image index', actual, expected, 2e-6)
        expected = ImageNoise(5, [3, 9]).normal_like(on_cpu)
        actual = ImageNoise(5, [3, 9]).normal_like(on_device)
        self.compare('normal noise by image index', actual, expected, 1e-5)

    def flexvar(self) -> None:
        """FlexVAR: codes, teacher-forced logits, and sampled codes, for which the CPU is the reference."""
        for name in ('teacher_forced_l2norm', 'teacher_forced_shared_aln'):
            info = load_json(f'flexvar/{name}')
            vectors = load_tensors(f'flexvar/{name}')
            model = self.flexvar_model(name)
            for i, case in enumerate(info['config']['cases']):
                images = uniform_images(case['xseed'], case['xshape']).to(self.device)
                idx_kBl = model.tokenizer.encode(images, case['patch_nums'])
                self.compare('flexvar codes', torch.cat(idx_kBl, dim=1), vectors[f'{i}.gt_idx'], 0)
                label_B = torch.tensor(info[f'case{i}']['labels_after_drop'], device=self.device)
                logits_BLV = model(label_B, model.teacher_input(idx_kBl, case['patch_nums']),
                                   case['patch_nums'])
                self.compare('flexvar logits', logits_BLV[:, ::case['lstep']], vectors[f'{i}.logits'], 5e-4)

        model = self.flexvar_model('sample_tiny')
        on_cpu = tiny_flexvar('sample_tiny')
        sizes = ((1, 1), (2, 3), (4, 7), (5, 9))

        def drawn(model: FlexVAR, **options) -> torch.Tensor:
            """All codes of two images, coarse to fine."""
            labels = model.as_labels([1, 2], 2, None)
            steps = model.sample_scales(labels, infer_patch_nums=sizes, rng=ImageNoise(0, [0, 1]), **options)
            return torch.cat([step.idx_Bl for step in steps], dim=1)

        for options in (dict(top_k=20), dict(top_k=20, greedy_unseen=False, pos_mode='crop')):
            self.compare('flexvar drawn codes', drawn(model, **options), drawn(on_cpu, **options), 0)

    def flexvar_model(self, name: str) -> FlexVAR:
        """A model with stored weights on the device: a copy, since the original is cached on the CPU."""
        model = copy.deepcopy(tiny_flexvar(name)).to(self.device)
        object.__setattr__(model, 'tokenizer', copy.deepcopy(model.tokenizer).to(self.device))
        return model

    def flowar(self) -> None:
        """FlowAR: conditions, velocity errors, the loss, gradients, and sampled latents."""
        for name in ('attn_mlp', 'attn_crossattn_mlp'):
            file = f'{name}_train'
            info = load_json(f'flowar/{file}')
            vectors = load_tensors(f'flowar/{file}')
            model = tiny_flowar(file).to(self.device)
            latent, t_KB, noise_BLZ = (vectors[key].to(self.device) for key in ('latent', 't', 'noise'))
            target_BLZ, teacher_BLZ = model.pyramid(latent)
            z_BLC = model(torch.tensor(info['effective_labels'], device=self.device), teacher_BLZ)
            error_KB = model.velocity_error(target_BLZ, z_BLC, t_KB, noise_BLZ)
            loss = model.total_loss(error_KB, t_KB)
            loss.backward()
            self.compare('flowar conditions', z_BLC, vectors['z'], 1e-4)
            self.compare('flowar velocity errors', error_KB, vectors['per_sample_scale_mse'], 1e-4)
            self.relative('flowar loss', loss.item(), info['loss'], 1e-5)
            for key, norm in info['grad_norms'].items():
                if norm > 1e-6:
                    self.relative('flowar gradients', model.get_parameter(key).grad.norm().item(), norm, 1e-3)
            self.flowar_latents(model, f'{name}_sample')

    def flowar_latents(self, model: FlowAR, name: str) -> None:
        """Published cases, and the first of them also with the published solver."""
        info = load_json(f'flowar/{name}')
        vectors = load_tensors(f'flowar/{name}')
        label_B = torch.tensor(info['labels'], device=self.device)

        def draw(case: dict) -> torch.Tensor:
            """Latents from the stored noise."""
            noise = [t.to(self.device) for t in given_noise(name).tensors]
            steps = model.sample_scales(
                label_B,
                cfg=case['cfg'],
                guidance_until=case['guidance'],
                num_steps=case['flow_upper_steps'],
                lower_steps=case['flow_lower_steps'],
                rng=GivenNoise(noise),
            )
            *_, last = steps
            return last.latent_BZnn

        for case in info['cases']:
            self.compare('flowar latents', draw(case), vectors[case['key']], 5e-4)
        with both_halves(model):
            self.compare('flowar latents, both halves', draw(info['cases'][0]), vectors['out0'], 5e-4)

    def npp(self) -> None:
        """NPP: logits at every patch size, and sampled codes, for which the CPU is the reference."""
        vectors = load_tensors('npp/gpt_forward')
        on_cpu = tiny_npp()
        on_device = copy.deepcopy(on_cpu).to(self.device)
        label_B = vectors['cond'].to(self.device)
        idx_BN = vectors['idx'].to(self.device)
        for p in (1, 2, 4, 8):
            self.compare('npp logits', on_device(label_B, idx_BN, p), vectors[f'logits_p{p}'], 5e-4)

        def drawn(model: NPP, **options) -> torch.Tensor:
            """All codes of two images."""
            labels = model.as_labels([1, 2], 2, None)
            return model.sample_tokens(labels, rng=ImageNoise(0, [0, 1]), **options)

        for options in (dict(), dict(guidance=2., cfg_interval=5), dict(guidance=2., top_k=20, top_p=0.9)):
            self.compare('npp drawn codes', drawn(on_device, **options), drawn(on_cpu, **options), 0)

    def training(self) -> None:
        """VAR: trajectories of the published trainer, step by step."""
        vectors = load_tensors('var/trainer')
        batches = []
        for i in range(3):
            images_B3HW = pixels(vectors[f'batch.{i}.images_u8']).to(self.device)
            label_B = vectors[f'batch.{i}.labels'].to(self.device)
            batches.append((images_B3HW, label_B))
        for name, run in load_json('var/trainer')['runs'].items():
            if run['global_manual_seed'] is not None or run['prog']:
                continue
            model = self.var(run['model'], label_smooth=run['label_smooth'])
            trainer = make_trainer(model, 0, run['clip'], run['ac'])
            for row in run['rows']:
                lr_wd_annealing(
                    run['sche'],
                    trainer.optimizer.optimizer,
                    run['peak_lr'],
                    run['wd'],
                    run['wd_end'],
                    row['g_it'],
                    run['wp_it'],
                    run['max_it'],
                    wp0=run['wp0'],
                    wpe=run['wpe'],
                )
                info = trainer.train_step(*batches[row['batch']], progress=0., stepping=row['stepping'])
                self.relative('trainer loss', info.loss.item(), row['loss'], 1e-3)
                if row['stepping']:
                    self.relative('trainer gradient norm', info.grad_norm.item(), row['grad_norm'], 1e-3)
            self.compare('trained head', model.head.weight, vectors[f'{name}.head.weight'], 1e-2)

    def run(self) -> dict[str, dict]:
        """Compare everything in full float32; returns `rows`."""
        allow_tf32(False)
        for group in (self.tokenizer, self.transformer, self.sampling, self.flexvar, self.flowar, self.npp,
                      self.training):
            group()
        return self.rows


# ---------------------------------------------------------------------------------------------- speed
def make_trainer(model: ARModel, precision: int, clip: float = 2., accumulate: int = 1) -> GeneratorTrainer:
    """Trainer with AdamW as published.

    Args:
        precision: one of the values of `PRECISIONS`.
        clip: largest norm of the gradient.
        accumulate: micro-steps of a step.
    """
    names, params, groups = filter_params(model, model.no_weight_decay())
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), weight_decay=0., fused=True)
    return GeneratorTrainer(model, AmpOptimizer(precision, optimizer, names, params, clip, accumulate))


def make_tokenizer_trainer(model: VQVAE) -> TokenizerTrainer:
    """Trainer of a tokenizer in bf16, with a PatchGAN from the first step on, as the most general case."""
    gan = dict(
        weight=0.5,
        start=0.,
        ramp=0.1,
        adaptive=True,
        adaptive_min=0.,
        adaptive_max=1e4,
        adaptive_eps=1e-6,
        augment=True,
    )
    criterion = build_loss(
        l1_weight=0.2,
        l2_weight=1.,
        perceptual='pyramid',
        lpips_files=None,
        discriminator='patchgan',
        dino_files=None,
        image_size=64,
        width=64,
        gan=gan,
    )
    criterion.to(next(model.parameters()).device)

    def make_optimizer(module: torch.nn.Module) -> AmpOptimizer:
        """AdamW for one of the two networks."""
        names, params, groups = filter_params(module)
        optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
        return AmpOptimizer(PRECISIONS['bf16'], optimizer, names, params, 1.)

    return TokenizerTrainer(model, make_optimizer(model), criterion, make_optimizer(criterion.discriminator),
                            [0.9999])


class Meter:
    """Measures seconds per call, peak memory, and which attention kernels a function runs."""

    def __init__(self, device: torch.device):
        self.device = device
        self.on_cuda = device.type == 'cuda'

    def measure(self, call: Callable[[], Any], num_images: int, repeats: int) -> dict:
        """Figures of a function.

        Args:
            call: the function.
            num_images: images that one call processes.
            repeats: timed calls, after two calls to warm up.
        """
        call()
        call()
        synchronize(self.device)

        # Time and memory. The median, since a busy machine delays single calls.
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
        times = [seconds_of(call, self.device) for _ in range(repeats)]
        median = sorted(times)[len(times) // 2]
        peak_gib = None
        if self.on_cuda:
            peak_gib = round(torch.cuda.max_memory_allocated() / 2 ** 30, 2)

        # Kernels, in a call of its own: the profiler slows it down.
        activities = [ProfilerActivity.CPU]
        if self.on_cuda:
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as trace:
            call()
            synchronize(self.device)
        kernels = {event.key[:100] for event in trace.key_averages() if KERNEL.search(event.key)}
        return dict(
            images_per_second=round(num_images / median, 2),
            median_seconds=round(median, 4),
            repeats=repeats,
            peak_memory_gib=peak_gib,
            attention_kernels=sorted(kernels),
        )


def speed(device: torch.device, depth: int, batch: int, repeats: int) -> dict[str, dict]:
    """Training and sampling of VAR at 256 px, and the tokenizer alone, which is a part of a training step."""
    allow_tf32(True)
    torch.manual_seed(0)
    meter = Meter(device)
    rows = {}
    images_B3HW = torch.rand(batch, 3, 256, 256, device=device) * 2 - 1
    label_B = torch.randint(0, 1000, (batch,), device=device)
    for name, dtype in (('bf16', torch.bfloat16), ('fp16', torch.float16)):
        vae, var = build_vae_var(device, depth=depth)
        trainer = make_trainer(var, PRECISIONS[name])
        losses = []

        def train_step(trainer=trainer, losses=losses) -> None:
            """One step in the middle of the training; notes its loss."""
            losses.append(trainer.train_step(images_B3HW, label_B, 0.5).loss)

        def draw(var=var, dtype=dtype) -> None:
            """One batch of images with guidance and filters."""
            with torch.autocast(device.type, dtype=dtype):
                image = var.sample(label_B.tolist(), guidance=2.5, top_k=900, top_p=0.96,
                                   rng=ImageNoise(0, range(batch)))
            assert image.isfinite().all() and image.shape == images_B3HW.shape

        rows[f'train {name}'] = meter.measure(train_step, batch, repeats)
        assert torch.stack(losses).isfinite().all() and losses[-1] < losses[0]
        rows[f'train {name}'].update(first_loss=losses[0].item(), last_loss=losses[-1].item())
        rows[f'sample {name}'] = meter.measure(draw, batch, repeats)
        if name == 'bf16':  # once is enough: it runs in float32 in both
            rows['tokenize float32'] = meter.measure(lambda vae=vae: vae.encode(images_B3HW), batch, repeats)
        del vae, var, trainer
    return rows


def make_flowar(preset: str, device: torch.device) -> FlowAR:
    """A published size with random weights; on the CPU, which only tries the script, a tiny model."""
    settings = dict(PRESETS['flowar'][preset])
    if device.type == 'cpu':
        settings |= dict(depth=1, width=64, diffloss_d=1, diffloss_w=64)
    config = FlowARConfig(**settings)
    with torch.device(device):
        return FlowAR(Latents(), **model_arguments(config))


def flowar_speed(device: torch.device, batch: int, repeats: int) -> dict[str, dict]:
    """FlowAR on latents of 256 px, without its tokenizer: training and sampling of S, the trunk of L."""
    allow_tf32(True)
    torch.manual_seed(0)
    meter = Meter(device)
    latent_BZhw = torch.randn(batch, 16, 16, 16, device=device)
    label_B = torch.randint(0, 1000, (batch,), device=device)
    model = make_flowar('flowar_s', device)

    # 1. Training steps of S in float32 with TF32, and in bf16.
    rows = {}
    for name in ('tf32', 'bf16'):
        trainer = make_trainer(model, PRECISIONS[name])
        losses = []

        def train_step(trainer=trainer, losses=losses) -> None:
            """One step in the middle of the training; notes its loss."""
            losses.append(trainer.train_step(latent_BZhw, label_B, 0.5).loss)

        rows[name] = meter.measure(train_step, batch, repeats)
        assert torch.stack(losses).isfinite().all()
        del trainer, train_step
    measured = {f'flowar_s train {name}': row for name, row in over_first(rows).items()}

    # 2. Sampling of S in bf16: the published solver, ours, and ours with fewer steps.
    rows = {}
    for name, solver, options in (
            ('both halves at every step', both_halves, {}),
            ('null class where it guides', nullcontext, {}),
            ('the same, 25 to 15 steps', nullcontext, dict(lower_steps=15))):
        def draw(options=options) -> None:
            """One batch of latents."""
            rng = ImageNoise(0, range(batch))
            with torch.autocast(device.type, dtype=torch.bfloat16):
                *_, last = model.sample_scales(label_B, cfg=4.3, rng=rng, **options)
            assert last.latent_BZnn.isfinite().all()

        with solver(model):
            rows[name] = meter.measure(draw, batch, repeats)
        rows[name]['seconds_per_image'] = rows[name]['median_seconds'] / batch
    measured |= {f'flowar_s sample bf16, {name}': row for name, row in over_first(rows).items()}

    # 3. The trunk of L forward and backward, at a quarter of the batch (rounded up): all activations kept, or
    #    computed again in the backward pass.
    rows = {}
    model = make_flowar('flowar_l', device)
    quarter = slice(math.ceil(batch / 4))
    _, teacher_BLZ = model.pyramid(latent_BZhw[quarter])
    for name, what in (('kept', 'none'), ('recomputed', 'block')):
        set_recompute(model, what)

        def trunk_step() -> None:
            """Forward and backward, without an optimizer."""
            model(label_B[quarter], teacher_BLZ).square().mean().backward()
            model.zero_grad()

        rows[name] = meter.measure(trunk_step, len(teacher_BLZ), repeats)
    measured |= {f'flowar_l trunk, activations {name}': row for name, row in over_first(rows).items()}
    return measured


def over_first(rows: dict[str, dict]) -> dict[str, dict]:
    """`rows`, each with its seconds and its peak memory as multiples of those of the first row."""
    first = next(iter(rows.values())).copy()
    for row in rows.values():
        for key in ('median_seconds', 'peak_memory_gib'):
            row[f'{key}_over_first'] = first[key] and round(row[key] / first[key], 3)
    return rows


# ---------------------------------------------------------------------------------------------- processes
def one_process_group(device: torch.device) -> dict[str, str]:
    """NCCL (gloo on the CPU) with one process: collectives and a training step under DDP."""
    os.environ.update(
        RANK='0',
        WORLD_SIZE='1',
        LOCAL_RANK='0',
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT='29533',
    )
    dist.initialize(backend='nccl' if device.type == 'cuda' else 'gloo')
    total = torch.ones(3, device=device)
    dist.allreduce(total)
    assert total.tolist() == [1., 1., 1.]
    assert dist.allgather_object('x') == ['x']

    vae = VQVAE(**load_json('var/vqvae')['config'], test_mode=False, measures={}).to(device)
    images_B3HW = torch.zeros(2, 3, 64, 64, device=device)
    loss = make_tokenizer_trainer(vae).train_step(images_B3HW, None, progress=0.5).loss
    assert loss.isfinite()
    backend = torch.distributed.get_backend()
    dist.finalize()
    return dict(backend=backend, result='ok')


def main() -> None:
    """Check everything, write the report, and exit with an error if a vector is out of tolerance."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--depth', type=int, default=16)
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--out', type=Path, default=None, help='folder of the JSON file')
    args = parser.parse_args()
    device = torch.device(args.device)
    begin = time.time()
    if device.type == 'cuda' and not torch.cuda.is_available():
        sys.exit('gpu_check: no CUDA device here; --device=cpu --depth=1 --batch=2 tries the script')

    name = torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'
    result = dict(device=name, command=' '.join(['python', *sys.argv]), doctor=report())
    result['vectors'] = Vectors(device).run()
    result['speed'] = speed(device, args.depth, args.batch, args.repeats)
    result['speed'] |= flowar_speed(device, args.batch, args.repeats)
    result['process_group'] = one_process_group(device)
    result['seconds'] = round(time.time() - begin)
    failed = [group for group, row in result['vectors'].items() if not row['error'] <= row['tolerance']]
    result['failed'] = failed
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f'gpu_check_{re.sub(r"[^0-9A-Za-z]+", "-", name)}.json').write_text(text + '\n')
    sys.exit(f'gpu_check: out of tolerance: {failed}' if failed else 0)


if __name__ == '__main__':
    main()
