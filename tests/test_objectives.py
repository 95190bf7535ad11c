"""What a training minimises beside likelihood: published numbers, closed forms, ranks, restarts, refusals."""
import contextlib
import dataclasses
import math
import types
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import train
from configs import CONFIGS, FlexVARConfig, NPPConfig, VARConfig, parse_training
from configs import objectives as terms
from configs.options import config_text
from models import VAR, VQVAE, FlexVAE, FlexVAR
from models.flexvar import FixedSchedule
from models.noise import GlobalBatch
from models.scales import block_causal
from objectives import OBJECTIVES, rear
from objectives.cca import CCA, cca_loss
from objectives.contrast import advised_beta, log_likelihood
from objectives.ddo import DDO, ddo_loss
from objectives.rear import REAR, alignment_loss
from objectives.sar import SAR
from pipeline import load
from tests.runs import (
    BATCH,
    TINY_VQVAE,
    Interrupt,
    assert_equal,
    interrupt,
    kept_logging,
    largest_difference,
    launch,
    message,
    prepared,
    read,
    same_weights,
    saved,
    steps_of,
    training,
)
from tests.vectors import assert_within, fill, flexvar_rule, load_json, load_tensors

LN2 = math.log(2)
CONTRASTS = ('ddo', 'cca')
# of the smallest trainings: no drop path where an exact gap is compared, and codes one by one
EXACT = dict(var=('--drop_path=0',), flexvar=('--drop_path=0',), npp=('--patch_level=1',))


def published(name, kind=None):
    cases = load_json(f'post_training/{name}')['cases']
    return [(i, case) for i, case in enumerate(cases) if kind in (None, case.get('kind'))]


class Given:
    """Stands for a generator over its own codes: gives these logits, one batch after the other."""
    num_classes = 1000
    codes_per_image = 680
    tokenizer = types.SimpleNamespace(encode=lambda idx_BL: idx_BL)

    def __init__(self, logits_2BLV, fake_idx_BL=None):
        self.logits = iter(logits_2BLV.chunk(2))
        self.fake_idx_BL = fake_idx_BL
        self.labels = []

    def encoding_of_step(self):
        return ()

    def draw_tokens(self, label_B, rng):
        return self.fake_idx_BL

    def metrics(self, aux):
        return {}

    def log_probabilities(self, label_B, tokens):
        self.labels.append(label_B)
        return next(self.logits).log_softmax(-1).gather(-1, tokens[..., None])[..., 0], {}


class Masks(GlobalBatch):
    """Draws nothing: these images get the null class."""

    def __init__(self, is_null_B):
        super().__init__()
        self.is_null_B = torch.tensor(is_null_B, dtype=torch.bool)

    def per_image(self, batch, device, fill, shape=()):
        return torch.where(self.is_null_B, -1., 2.)


def outcome(objective, t, i, is_null_B, label_B, fake_idx_BL=None, dtype=torch.float32):
    """(loss, gaps, gradient by the logits, labels of both halves) of a stored case."""
    logits_2BLV = t[f'{i}.logits_2BLV'].to(dtype, copy=True).requires_grad_()
    reference = Given(t[f'{i}.ref_logits_2BLV'].to(dtype), fake_idx_BL)
    model = Given(logits_2BLV)
    objective.prepare(model, lambda: reference)
    with Masks(is_null_B):
        loss, aux = objective.loss(model, t[f'{i}.idx_BL'], label_B, 0.)
    loss.backward()
    assert_equal(model.labels, reference.labels)
    return loss.item(), torch.cat([aux['gap_B'], aux['gap_negative_B']]), logits_2BLV.grad, model.labels


# ---------------------------------------------------------------------------------------------- published
@pytest.mark.parametrize(('i', 'case'), published('cca', 'CCA'))
def test_cca_is_the_published_one(i, case):
    t = load_tensors('post_training/cca')
    weight, mask, label_B = case['lambda_'], case['null_mask'], t[f'{i}.label_B']
    objective = CCA(case['beta'], case['uncond_ratio'], weight)
    loss, _, grad, labels = outcome(objective, t, i, mask, label_B)
    # without a null class the published code does not divide
    factor = max(weight, 1) if case['uncond_ratio'] == 0 else 1
    assert loss * factor == pytest.approx(case['loss'], rel=2e-6)
    assert_within(grad * factor, t[f'{i}.grad_2BLV'], 1e-7)
    assert torch.equal(torch.cat(labels), t[f'{i}.labels_2B'])
    _, gap_2B, _, _ = outcome(objective, t, i, mask, label_B, dtype=torch.float64)
    assert_within(gap_2B, t[f'{i}.gap_2B'], 1e-9)


@pytest.mark.parametrize(('i', 'case'), published('ddo'))
def test_ddo_is_the_published_one(i, case):
    t = load_tensors('post_training/ddo')
    label_B = torch.arange(case['B'])
    for null_weight, suffix, expected in (('1', 'grad_2BLV', case['loss_published']),
                                          ('alpha', 'grad_intended_2BLV', case['loss_intended'])):
        objective = DDO(case['beta'], 0.1, case['alpha'], null_weight, 'drawn')
        given = t, i, case['null_mask'], label_B, t[f'{i}.fake_idx_BL']
        loss, _, grad, labels = outcome(objective, *given)
        assert loss == pytest.approx(expected, rel=2e-6)
        # The published gradient is that of sums that were rounded before they were subtracted.
        rounding = 0. if null_weight == 'alpha' else 1e-6 * case['beta']
        assert_within(grad, t[f'{i}.{suffix}'], max(1e-7, rounding))
        null_B = torch.tensor(case['null_mask'], dtype=torch.bool)
        assert_equal(labels, [label_B.masked_fill(null_B, 1000)] * 2)
        _, gap_2B, _, _ = outcome(objective, *given, dtype=torch.float64)
        assert gap_2B.tolist() == pytest.approx(case['gap_real'] + case['gap_fake'], abs=1e-9)


@pytest.fixture(scope='module')
def published_flexvar():
    """(model, its codes) of the vectors of SAR."""
    info, t = load_json('post_training/sar'), load_tensors('post_training/sar')
    config = dict(info['config'])
    tokenizer = FlexVAE(info['V'], info['Z'], z_channels=16, net='tiny', test_mode=True)
    tokenizer.quantize.embedding.weight.data.copy_(t['codebook_VZ'])
    model = fill(FlexVAR(tokenizer, patch_nums=(1, 2, 4, 6), **config), flexvar_rule(info['wseed']),
                 kept=('pos_1LC',))
    for name, (shape, total, norm) in info['weight_check'].items():
        weight = model.get_parameter(name).double()
        assert list(weight.shape) == shape
        assert (weight.sum().item(), weight.norm().item()) == pytest.approx((total, norm), rel=1e-6)
    tokenizer.encode = lambda images, sides: [t[f'idx_{side}'] for side in sides]
    model.schedule = FixedSchedule((1, 2, 4, 6))
    return model.train()


def with_logits(model, objective, label_B):
    """(loss, aux, logits of every call of the head with their gradients) of a step."""
    seen = []

    def keep(_, __, logits_NV):
        if logits_NV.requires_grad:
            logits_NV.retain_grad()
            seen.append(logits_NV)
    hook = model.head.register_forward_hook(keep)
    model.zero_grad()
    loss, aux = objective.loss(model, torch.zeros(0), label_B, 0.)
    hook.remove()
    loss.backward()
    return loss.item(), aux, seen


@pytest.mark.parametrize(('i', 'case'), published('sar'))
def test_sar_is_the_published_one(published_flexvar, i, case):
    t, mode, model = load_tensors('post_training/sar'), case['mode'], published_flexvar
    objective = SAR(case['sigma'], target='teacher' if mode == 'csfl' else 'real')
    loss, aux, (teacher_NV, student_NV) = with_logits(model, objective, t['label_B'])
    assert aux['losses'].loss_BL.mean().item() == pytest.approx(case['teacher_loss'], rel=2e-6)
    assert aux['student_loss'].item() == pytest.approx(case['student_loss'], rel=2e-6)
    assert loss == pytest.approx(case['total'], rel=2e-6)
    assert_within(teacher_NV.view(3, 57, 24), t['teacher_logits_BLV'], 1e-5)
    assert_within(student_NV.view(3, 36, 24), t['student_logits_BlV'], 1e-5)
    assert_within(teacher_NV.grad.view(3, 57, 24), t[f'{mode}.grad_teacher_logits_BLV'], 1e-6)
    assert_within(student_NV.grad.view(3, 36, 24), t[f'{mode}.grad_student_logits_BlV'], 1e-6)
    for name, norm in case['grad_norms'].items():
        assert model.get_parameter(name).grad.norm().item() == pytest.approx(norm, rel=1e-4), name


# ---------------------------------------------------------------------------------------------- SAR
@pytest.mark.parametrize('scope', ['last', 'all'])
@pytest.mark.parametrize('draws', [False, True])
def test_sar_without_weight_is_plain_likelihood(published_flexvar, scope, draws):
    """The second pass leaves loss and gradient of the first one alone; no gradient passes predictions."""
    model, label_B = published_flexvar, load_tensors('post_training/sar')['label_B']
    torch.manual_seed(0)
    plain, _, (teacher_NV,) = with_logits(model, OBJECTIVES['mle'](), label_B)
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    for sigma in (0., 0.3):
        torch.manual_seed(0)
        loss, aux, seen = with_logits(model, SAR(sigma, scope, draws=draws, top_k=900), label_B)
        assert loss == pytest.approx(plain + sigma * aux['student_loss'].item(), rel=1e-6)
        assert torch.equal(seen[0].grad, teacher_NV.grad)
        same = [torch.allclose(parameter.grad, grad, rtol=0, atol=1e-7)
                for parameter, grad in zip(model.parameters(), expected, strict=True)]
        assert all(same) == (sigma == 0)
    length = 36 if scope == 'last' else 56
    assert aux['num_student_tokens'] == 1 + length


def test_sar_of_a_single_scale_is_plain_likelihood(published_flexvar, monkeypatch):
    model, label_B = published_flexvar, load_tensors('post_training/sar')['label_B']
    monkeypatch.setattr(model, 'schedule', FixedSchedule((1,)))
    losses = []
    for name in ('mle', 'sar'):
        torch.manual_seed(0)
        losses.append(with_logits(model, OBJECTIVES[name](), label_B)[0])
    assert losses[0] == losses[1]


@pytest.mark.parametrize('scope', ['last', 'all'])
def test_targets_of_sar_agree_where_the_teacher_is_right(published_flexvar, monkeypatch, scope):
    """And there the pass over all scales is teacher forcing once more."""
    model, label_B = published_flexvar, load_tensors('post_training/sar')['label_B']
    training_loss = model.training_loss

    def right(*args):
        loss, aux = training_loss(*args)
        return loss, aux | dict(losses=aux['losses']._replace(predicted_BL=aux['target_BL']))
    monkeypatch.setattr(model, 'training_loss', right)
    of_teacher, of_real = (SAR(1., scope, target).loss(model, torch.zeros(0), label_B, 0.)[1]
                           for target in ('teacher', 'real'))
    assert of_teacher['student_loss'] == of_real['student_loss']
    if scope == 'all':
        expected = of_real['losses'].loss_BL[:, 1:].mean().item()
        assert of_real['student_loss'].item() == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------------------------------------- toys
def test_ddo_reaches_the_data():
    """Softmax over five codes with exact expectations, alpha = beta = 1, from any reference."""
    data = torch.tensor([40, 30, 15, 10, 5])
    for reference in (torch.tensor([5, 10, 15, 30, 40]), torch.tensor([20, 20, 20, 20, 20])):
        real = torch.arange(5).repeat_interleave(data)
        fake = torch.arange(5).repeat_interleave(reference)
        log_reference = (reference / 100).double().log()
        logits = log_reference.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn='strong_wolfe')

        def loss_of(logits=logits, log_reference=log_reference, real=real, fake=fake, optimizer=optimizer):
            optimizer.zero_grad()
            gap = logits.log_softmax(0) - log_reference
            loss = ddo_loss(gap[real], gap[fake], torch.zeros(100, dtype=torch.bool), beta=1., alpha=1.)
            loss.backward()
            return loss
        optimizer.step(loss_of)
        p = data / 100
        assert (p * (p.log() - logits.log_softmax(0))).sum().item() < 1e-6


def test_cca_is_guidance():
    """Three classes, four codes and free gaps: gap = 1 / beta log [p(code | class) / (lambda p(code))]."""
    count = torch.tensor([[6, 2, 1, 1], [1, 5, 2, 2], [1, 1, 3, 5]])
    total = count.sum()
    beta, weight = 0.5, 2.
    right = torch.arange(12).repeat_interleave(count.flatten())
    # a code of any image beside a class of any image
    wrong = torch.arange(12).repeat_interleave((count.sum(1)[:, None] * count.sum(0)).flatten())
    gaps = torch.zeros(12, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([gaps], max_iter=200, tolerance_grad=1e-12, tolerance_change=0.,
                                  line_search_fn='strong_wolfe')

    def loss_of():
        optimizer.zero_grad()
        is_negative = torch.ones(len(wrong), dtype=torch.bool)
        loss = cca_loss(gaps[right], gaps[wrong], is_negative, beta, weight)
        loss.backward()
        return loss
    optimizer.step(loss_of)
    ratio = count / count.sum(1, keepdim=True) / (count.sum(0) / total)
    assert_within(gaps.detach(), ((ratio / weight).log() / beta).flatten().double(), 1e-4)

    # where there are no wrong labels, every gap grows without end
    positive = torch.full((12,), 3., requires_grad=True)
    cca_loss(positive, positive, torch.zeros(12, dtype=torch.bool), beta, weight).backward()
    assert (positive.grad < 0).all()


def test_extreme_gaps_are_finite():
    """B = 1, all images null, and gaps of any size."""
    for gap in (-1e4, 0., 1e4):
        gap_B = torch.tensor([gap], requires_grad=True)
        for is_null in (False, True):
            mask_B = torch.tensor([is_null])
            for loss in (ddo_loss(gap_B, gap_B, mask_B, 1., 10.), cca_loss(gap_B, gap_B, mask_B, 1., 50.)):
                gradient, = torch.autograd.grad(loss, gap_B)
                assert loss.isfinite() and gradient.isfinite().all()


# ---------------------------------------------------------------------------------------------- gradients
@contextlib.contextmanager
def in_float64(monkeypatch):
    """Everything in float64, also what is computed in float32 for the sake of half precision."""
    block_causal.cache_clear()
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, 'float', torch.Tensor.double)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        block_causal.cache_clear()


@pytest.mark.parametrize('name', CONTRASTS)
def test_gradients_are_those_of_finite_differences(monkeypatch, name):
    """Of a VAR of one block, in 20 weights."""
    with in_float64(monkeypatch):
        tokenizer = VQVAE(**TINY_VQVAE)
        torch.nn.init.normal_(tokenizer.quantize.embedding.weight, std=0.3)
        model, reference = (VAR(tokenizer, num_classes=3, depth=1, embed_dim=16, num_heads=2,
                                attn_l2_norm=True, patch_nums=(1, 2, 4)) for _ in range(2))
        for parameter in (*model.parameters(), *reference.parameters()):
            torch.nn.init.normal_(parameter, std=0.3)
        objective = DDO(0.1, 0.3, 2.) if name == 'ddo' else CCA(0.1, 0.3, 2.)
        objective.prepare(model.train(), lambda: reference.eval())
        # Samples are the same ones at all weights of the model, and take long in float64.
        fake_idx_BL = torch.randint(32, (6, 21))
        monkeypatch.setattr(objective, 'fakes', lambda *_: (list(fake_idx_BL.split([1, 4, 16], dim=1)),
                                                            torch.ones(6, dtype=torch.bool)), raising=False)
        idx_BL, label_B = torch.randint(32, (6, 21)), torch.arange(6) % 3

        def loss_of():
            torch.manual_seed(5)
            loss, aux = objective.loss(model, idx_BL, label_B, 0.)
            assert aux['is_null_B'].any() and not aux['is_null_B'].all()
            return loss
        loss_of().backward()
        parameters = list(model.parameters())
        for _ in range(20):
            parameter = parameters[torch.randint(len(parameters), ()).item()]
            i = torch.randint(parameter.numel(), ()).item()
            flat = parameter.data.view(-1)
            before, values = flat[i].item(), []
            for change in (1e-5, -1e-5):
                flat[i] = before + change
                values.append(loss_of().item())
            flat[i] = before
            expected = (values[0] - values[1]) / 2e-5
            assert parameter.grad.view(-1)[i].item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


# ---------------------------------------------------------------------------------------------- trainings
@pytest.fixture(scope='session')
def files(families, tmp_path_factory):
    """Random weights of each family, twice."""
    folder, paths = tmp_path_factory.mktemp('references'), {}
    for model in EXACT:
        generator = prepared(training(families[model], folder / model, model=model)).model
        for seed, name in enumerate(('one', 'two')):
            torch.manual_seed(seed)
            for parameter in generator.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
            paths[model, name], _ = saved(generator, folder / f'{model}_{name}.pth')
    return paths


def flags_of(families, files, model, folder, objective, *more):
    """Command line of the smallest training that begins with given weights."""
    return training(families[model], folder, f'--init_from={files[model, "one"]}', f'--objective={objective}',
                    *EXACT[model], *more, model=model)


@pytest.fixture
def command(families, files):
    return partial(flags_of, families, files)


@pytest.mark.parametrize('model', EXACT)
@pytest.mark.parametrize('objective', [
    ('ddo', '--ddo_alpha=3'), ('ddo', '--ddo_alpha=0.5', '--ddo_codes=drawn'), ('cca', '--cca_lambda=7'),
], ids=['ddo', 'drawn', 'cca'])
def test_nothing_differs_before_the_first_step(command, tmp_path, model, objective):
    """Every gap is exactly 0, the loss has a closed form, and likelihoods are those of teacher forcing."""
    run = prepared(command(model, tmp_path, *objective, '--uncond_ratio=0.4'))
    images_B3HW, label_B, _ = next(run.batches)
    run.trainer.begin_step(label_B)
    torch.manual_seed(3)
    with GlobalBatch(0, len(label_B)):
        loss, aux = run.trainer.objective.loss(run.model.train(), images_B3HW, label_B, 0.)
    for name in ('gap_B', 'gap_negative_B'):
        assert torch.equal(aux[name], torch.zeros(len(label_B)))
    weight = run.trainer.objective.weight if objective[0] == 'cca' else run.trainer.objective.alpha
    weight_B = torch.where(aux['is_negative_B'], weight, 1. if objective[0] == 'cca' else 0.)
    assert 0 < aux['is_null_B'].sum() < len(label_B) and aux['is_negative_B'].any()
    expected = LN2 * (1 + weight_B.mean().item()) / max(weight, 1)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    metrics = run.trainer.metrics(aux)
    assert metrics['L_reference'] == pytest.approx(metrics['L_mean'], rel=1e-5)

    # the model has gone on: gaps are those of whole likelihoods
    tokens = run.model.tokenizer.encode(images_B3HW, *run.model.encoding_of_step())
    reference = run.trainer.objective.frozen['reference']
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    loss.backward()
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter -= 0.1 * parameter.grad
    gap = run.trainer.objective.gap(run.model.eval(), label_B, tokens)
    likelihoods = [log_likelihood(one, label_B, tokens) for one in (run.model, reference)]
    assert_within(gap.gap_B, likelihoods[0] - likelihoods[1], 5e-4)
    assert gap.gap_B.abs().min() > 1e-4
    assert not reference.training


@pytest.mark.parametrize('codes', ['reencoded', 'drawn'])
@pytest.mark.parametrize('model', EXACT)
def test_samples_follow_the_place_in_the_global_batch(command, tmp_path, model, codes):
    """And the seed of the step; the generators of torch stay where they are."""
    run = prepared(command(model, tmp_path, 'ddo', f'--ddo_codes={codes}'))
    objective, label_B = run.trainer.objective, torch.arange(BATCH) % 4
    encoding = run.model.encoding_of_step()

    def drawn(seed, start, end):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        with GlobalBatch(start, BATCH):
            tokens, is_finite_B = objective.fakes(label_B[start:end], encoding)
        assert torch.equal(torch.get_rng_state(), before) and is_finite_B.all()
        return tokens if isinstance(tokens, torch.Tensor) else torch.cat(tokens, dim=1)
    whole_BL = drawn(1, 0, BATCH)
    assert torch.equal(torch.cat([drawn(1, 0, 5), drawn(1, 5, BATCH)]), whole_BL)
    assert not torch.equal(drawn(2, 0, BATCH), whole_BL)
    reference = objective.frozen['reference']
    assert run.model.training and not reference.training
    blocks = reference.layers if model == 'npp' else reference.blocks
    assert all(block.attn.cache is None for block in blocks)


def test_equal_labels_are_positive_examples():
    label_B = torch.tensor([2, 2, 1, 0])
    objective = CCA(0.5, 0., 3.)
    objective.begin_step(label_B)
    t = load_tensors('post_training/cca')
    model, reference = (Given(t[f'3.{name}']) for name in ('logits_2BLV', 'ref_logits_2BLV'))
    objective.prepare(model, lambda: reference)
    _, aux = objective.loss(model, t['3.idx_BL'], label_B, 0.)
    assert aux['is_negative_B'].tolist() == [False, True, True, True]


def test_a_step_of_one_class_has_no_wrong_labels(caplog):
    t = load_tensors('post_training/cca')
    objective = CCA(0.02, 0., 3.)
    for _ in range(2):
        label_B = torch.full((4,), 2)
        objective.begin_step(label_B)
        model, reference = (Given(t[f'3.{name}']) for name in ('logits_2BLV', 'ref_logits_2BLV'))
        objective.prepare(model, lambda reference=reference: reference)
        loss, aux = objective.loss(model, t['3.idx_BL'], label_B, 0.)
        assert loss.isfinite() and not aux['is_negative_B'].any()
        metrics = objective.metrics(model, aux)
        assert metrics['gap_negative'] == metrics['margin'] == 0 != metrics['gap']
    assert [record.getMessage() for record in caplog.records] == [
        'all 4 images of a step are of one class: there is no wrong label to learn from']


def test_samples_that_are_not_finite_leave_the_step_out():
    """Their loss is nan, and so is the gradient: the step is left out, and too many of them end the run."""
    t, B = load_tensors('post_training/ddo'), 4
    logits_2BLV = t['3.logits_2BLV'].detach().clone().requires_grad_()
    model, reference = Given(logits_2BLV), Given(t['3.ref_logits_2BLV'])
    pixels = torch.zeros(B, 3, 2, 2)
    pixels[1] = torch.nan
    reference.tokenizer = types.SimpleNamespace(decode=lambda tokens: pixels,
                                                encode=lambda images_B3HW: t['3.fake_idx_BL'])
    objective = DDO(0.02, 0., 10.)
    objective.prepare(model, lambda: reference)
    loss, _ = objective.loss(model, t['3.idx_BL'], torch.arange(B), 0.)
    loss.backward()
    assert loss.isnan() and logits_2BLV.grad[B + 1].isnan().any()


# With random weights and a high rate the gaps become large, so that any difference would grow.
STEPS = ['--ep=1', '--contrast_beta=0.3', '--drop_path=0.2', '--save_every=2', '--tb=0', '--tb_samples=0']
OF = dict(ddo=[*STEPS, '--ddo_alpha=2'], cca=[*STEPS, '--cca_lambda=2'])


@pytest.fixture(scope='module')
def whole(families, files, tmp_path_factory):
    """Folders of trainings by one process in one step per batch, by objective, made on demand."""
    done = {}

    def get(name):
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name)
            with kept_logging():
                train.train(prepared(flags_of(families, files, 'var', done[name], name, *OF[name])))
        return done[name]
    return get


@pytest.mark.parametrize('name', ['cca', pytest.param('ddo', marks=pytest.mark.slow)])
def test_micro_steps_equal_the_large_batch(command, here, whole, tmp_path, name):
    """With drop path and the null class; samples and wrong labels follow the place in the global batch."""
    here(train, *command('var', tmp_path, name, *OF[name], '--ac=4'))
    one, four = read(whole(name)), read(tmp_path)
    assert largest_difference(one, four) < 1e-5
    steps, micro_steps = steps_of(whole(name)), steps_of(tmp_path)
    assert [line['grad_norm'] for line in micro_steps] == pytest.approx([line['grad_norm'] for line in steps],
                                                                        rel=1e-4)
    assert steps[-1]['gap'] != 0 != steps[-1]['gap_negative']


def test_a_checkpoint_holds_no_more_than_a_digest_of_the_reference(command, whole, trained_folder, tmp_path):
    """It samples and begins another training as any other one; no score of the validation marks the best."""
    folder = whole('cca')
    content, plain = read(folder), read(trained_folder('var'))
    assert content['trainer'].keys() ^ plain['trainer'].keys() == {'frozen', 'var_ema', 'ema_updates'}
    assert [*content['trainer']['frozen']] == ['reference']
    assert content['trainer']['var_wo_ddp'].keys() == plain['trainer']['var_wo_ddp'].keys()
    assert not (folder / 'ar-ckpt-best.pth').exists()
    assert (trained_folder('var') / 'ar-ckpt-best.pth').exists()
    path = folder / 'ar-ckpt-last.pth'
    assert len(load(path)([0, 1], guidance=1.)) == 2
    begun = prepared(command('var', tmp_path, 'mle', f'--init_from={path}'))
    assert_equal(dict(begun.model.state_dict()), dict(content['trainer']['var_wo_ddp']))


@pytest.mark.slow
def test_the_best_checkpoint_is_that_of_the_lowest_distance(command, here, monkeypatch, tmp_path):
    """Also of a start that is killed between the checkpoint and its distance."""
    class Distance:
        name = 'fid_1k'
        values = iter([5., math.nan, 3., 4.])

        def __call__(self, *_, **__):
            value = next(self.values)
            if math.isnan(value):
                raise Interrupt
            return value
    monkeypatch.setattr(train, 'build_training_fid', lambda *_: Distance())
    flags = command('var', tmp_path, 'cca', '--ep=3', '--eval_every=1', '--tb=0', '--tb_samples=0')
    with pytest.raises(Interrupt):
        here(train, *flags)
    assert read(tmp_path, 'ar-ckpt-best.pth')['epoch'] == 1
    here(train, *flags)
    assert read(tmp_path, 'ar-ckpt-best.pth')['epoch'] == 2
    assert read(tmp_path)['epoch'] == 3


@pytest.mark.slow
@pytest.mark.parametrize('name', CONTRASTS)
def test_two_processes_equal_one(command, whole, tmp_path, name):
    launch('train.py', command('var', tmp_path, name, *OF[name]), nproc=2)
    one, two = read(whole(name)), read(tmp_path)
    assert largest_difference(one, two) < 1e-5
    assert one['trainer']['frozen'] == two['trainer']['frozen']
    of_one, of_two = (steps_of(folder)[-1] for folder in (whole(name), tmp_path))
    for key in ('gap', 'gap_negative', 'gap_null', 'contrast_loss', 'share_above'):
        assert of_two[key] == pytest.approx(of_one[key], rel=1e-3, abs=1e-3), key


def test_an_interrupted_run_continues_to_the_last_bit(command, here, whole, stops, files, tmp_path):
    """The reference is read again; another one, or another objective, is refused."""
    again = command('var', tmp_path, 'ddo', *OF['ddo'])
    interrupt(lambda: here(train, *again), 3)
    assert read(tmp_path)['iter'] == 2
    other = stops(train, *again, f'--ref_from={files["var", "two"]}')
    assert 'was trained against another reference' in other
    assert 'was trained with --objective=ddo, got --objective=mle' in stops(
        train, *command('var', tmp_path, 'mle', '--ep=1', '--drop_path=0.2'))
    here(train, *again)
    assert_equal(read(tmp_path)['trainer'], read(whole('ddo'))['trainer'])


def test_a_reference_alone_is_no_beginning(command, files, tmp_path, caplog):
    """Without --init_from the weights are random, which a line says."""
    begun = command('var', tmp_path, 'cca')
    reference = str(files['var', 'one'])
    prepared(begun)
    assert 'random weights' not in caplog.text
    prepared([flag.replace('--init_from=', '--ref_from=') for flag in begun])
    assert f'random weights, not with those of the reference {reference!r}: pass --init_from=' in caplog.text


@pytest.mark.slow
def test_rounds_begin_with_the_result_of_the_last_one(command, here, files, tmp_path):
    """A reference of its own is not the start; averaged weights come first in both."""
    run = prepared(command('var', tmp_path / 'a', 'ddo', f'--ref_from={files["var", "two"]}'))
    assert_equal(run.trainer.objective.frozen['reference'].state_dict(), torch.load(files['var', 'two']))
    assert_equal(run.model.state_dict(), torch.load(files['var', 'one']))
    here(train, *command('var', tmp_path / 'first', 'cca', '--ep=1', '--ema=0.5'))
    first = tmp_path / 'first' / 'ar-ckpt-last.pth'
    run = prepared(command('var', tmp_path / 'second', 'cca', f'--init_from={first}'))
    averaged = read(tmp_path / 'first')['trainer']['var_ema']
    for model in (run.model, run.trainer.objective.frozen['reference']):
        assert_equal(dict(model.state_dict()), dict(averaged))
    assert not same_weights(read(tmp_path / 'first'), dict(trainer=dict(var_wo_ddp=averaged)))


@pytest.mark.slow
@pytest.mark.parametrize(('model', 'name', 'flags'), [
    ('flexvar', 'ddo', ['--ep=1', '--ddo_codes=drawn']), ('flexvar', 'cca', ['--ep=1']),
    ('flexvar', 'sar', ['--ep=1', '--sar_scope=all']), ('flexvar', 'sar', ['--ep=1', '--sar_sample=1']),
    ('npp', 'cca', ['--epochs=1', '--lr=1e-3']), ('npp', 'ddo', ['--epochs=1', '--lr=1e-3']),
    ('npp', 'rear', ['--epochs=2', '--lr=1e-3', '--patch_level=2'])])
def test_every_family_trains_alike_on_two_processes(command, here, tmp_path, model, name, flags):
    launch('train.py', command(model, tmp_path / 'two', name, *flags), nproc=2)
    here(train, *command(model, tmp_path / 'one', name, *flags, '--ac=2'))
    assert largest_difference(read(tmp_path / 'one'), read(tmp_path / 'two')) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(('model', 'name', 'flags'), [
    ('var', 'cca', OF['cca']), ('var', 'ddo', OF['ddo']), ('flexvar', 'sar', ['--ep=1', '--sar_sigma=0.5']),
    ('npp', 'cca', ['--epochs=1', '--lr=1e-3', '--ac=2'])])
def test_sharded_weights_train_as_copies(command, tmp_path, model, name, flags):
    """The model is called twice in a step; the reference is whole on every rank."""
    for folder, is_sharded in (('copies', 0), ('sharded', 1)):
        launch('train.py', command(model, tmp_path / folder, name, *flags, f'--shard={is_sharded}'), nproc=2)
    assert largest_difference(read(tmp_path / 'copies'), read(tmp_path / 'sharded')) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('flags', [['--tfast=3'], ['--act_ckpt=block'], ['--fp16=2'], ['--auto_batch=1']])
def test_ways_of_computing(command, here, tmp_path, flags):
    """Compiled blocks, blocks computed again, and half precision begin with the same small gaps."""
    here(train, *command('var', tmp_path, 'cca', *OF['cca'], '--drop_path=0', *flags))
    first = steps_of(tmp_path)[0]
    assert abs(first['gap']) < 1e-3


# ---------------------------------------------------------------------------------------------- reAR
def test_rear_is_the_published_one():
    """Its sequences begin with a token more than ours, and read every code."""
    t, stored = load_tensors('post_training/rear'), load_json('post_training/rear')
    logits_BLV, encode_BLZ, decode_BLZ = (t[name].clone().requires_grad_()
                                          for name in ('logits_BLV', 'encode_BLZ', 'decode_BLZ'))
    likelihood = F.cross_entropy(logits_BLV[:, :-1].transpose(1, 2), t['idx_BN'])
    alignment = alignment_loss(encode_BLZ[:, 2:], decode_BLZ[:, 1:-1], t['code_vectors_BNZ'],
                               t['perturbed_BN'].bool())
    (likelihood + alignment).backward()
    assert likelihood.item() == pytest.approx(stored['ar_loss'], rel=1e-6)
    assert alignment.item() == pytest.approx(stored['proj_loss'], rel=1e-6)
    for name, given in (('logits', logits_BLV), ('encode', encode_BLZ), ('decode', decode_BLZ)):
        assert_within(given.grad, t[f'grad_{name}'], 1e-6)


def test_rear_is_refused_where_weights_are_sharded():
    with pytest.raises(ValueError, match=r'--objective=rear trains heads.*leave out --shard'):
        CONFIGS['npp'](rear=True, shard=True, data_path='digits')


def test_noise_of_rear_falls_and_follows_the_place_of_an_image():
    idx_BN = torch.zeros(400, 16, dtype=torch.int64)
    objective = REAR(noise_until=0.75)

    def replaced(progress, rows=slice(None)):
        torch.manual_seed(1)
        with GlobalBatch(rows.start or 0, len(idx_BN)):
            return objective.with_noise(idx_BN[rows], 1000, progress) != 0
    assert replaced(0.).float().mean().item() == pytest.approx(1 / 2, abs=0.03)
    assert replaced(0.25).float().mean().item() == pytest.approx(1 / 3, abs=0.03)
    assert not replaced(0.75).any() and not replaced(1.).any()
    assert torch.equal(replaced(0.)[100:], replaced(0., slice(100, None)))
    shares_B = replaced(0.).float().mean(1)
    assert shares_B.min() < 0.1 and shares_B.max() > 0.9, 'every image has a share of its own'


@pytest.mark.slow
def test_rear_trains_heads_beside_the_model(families, codes, here, monkeypatch, tmp_path):
    """Larger patches train as ever, a restart is exact, and the heads are no part of the model."""
    monkeypatch.setattr(rear, 'HEAD_WIDTH', 32)

    def flags(name, *more):
        return training(families['npp'], tmp_path / name, f'--code_path={codes}', '--lr=1e-3', '--ema=0.9',
                        '--save_every=2', '--tb=0', *more, model='npp')
    here(train, *flags('plain'))
    here(train, *flags('once', '--rear=1'))
    interrupt(lambda: here(train, *flags('twice', '--rear=1')), 7)
    here(train, *flags('twice', '--rear=1'))
    plain, once, twice = (read(tmp_path / name)['trainer'] for name in ('plain', 'once', 'twice'))
    assert_equal(once, twice)
    assert once.keys() ^ plain.keys() == {'heads'}
    assert once['var_wo_ddp'].keys() == plain['var_wo_ddp'].keys()
    of_plain, of_rear = steps_of(tmp_path / 'plain'), steps_of(tmp_path / 'once')
    for before, line in zip(of_plain, of_rear, strict=True):
        assert (line['L_align'] != 0) == (line['prog_patch'] == 1)
        assert (line['L_mean'] == before['L_mean']) == (line['step'] < 5)
    assert len(load(tmp_path / 'once' / 'ar-ckpt-last.pth')([0, 1])) == 2


# ---------------------------------------------------------------------------------------------- flags
def test_both_tables_name_the_same_objectives():
    assert OBJECTIVES.keys() == terms.OBJECTIVES.keys()


@pytest.mark.parametrize(('flags', 'words'), [
    (['--objective=ddp'], "--objective must be one of mle, ddo, cca, sar, rear, got 'ddp'"),
    (['--objective=cca'], 'pass --init_from=FILE, and --ref_from=FILE where'),
    (['--model=npp', '--objective=cca', '--patch_level=1'], 'pass --gpt_ckpt=FILE'),
    (['--model=npp', '--objective=cca', '--gpt_ckpt=f'], 'pass --patch_level=1'),
    (['--objective=ddo', '--init_from=f', '--reset=head'], '--reset=head does not'),
    (['--objective=ddo', '--init_from=f', '--pg=0.5'], 'leave out --pg'),
    (['--objective=ddo', '--init_from=f', '--ls=0.1'], '--ls smooths a loss'),
    (['--objective=cca', '--init_from=f', '--scale_weights=equal'], '--scale_weights weighs a loss that'),
    (['--objective=cca', '--init_from=f', '--scale_weights=1,1,1,1,1,1,1,1,1,1'], 'the sum over all codes'),
    (['--objective=cca', '--init_from=f', '--ddo_alpha=3'], '--ddo_alpha is for --objective=ddo, got'),
    (['--contrast_beta=3'], '--contrast_beta is for --objective=ddo or cca, got --objective=mle'),
    (['--objective=ddo', '--init_from=f', '--ddo_codes=x'], '--ddo_codes must be reencoded or drawn, got'),
    (['--model=flowar', '--objective=ddo'], 'velocities: train on with --objective=mle'),
    (['--model=flowar', '--objective=cca'], 'velocities: train on with --objective=mle'),
    (['--objective=sar'], "nor the teacher's argmax is a consistent target: pass --model=flexvar"),
    (['--model=npp', '--objective=sar'], 'no scales'),
    (['--model=flowar', '--objective=sar'], 'it predicts velocities'),
    (['--model=flexvar', '--objective=sar', '--sar_cfg=9'], '--sar_cfg is of drawn predictions: pass'),
    (['--objective=rear'], 'codes that are read one by one'),
    (['--model=npp', '--rear_noise=0.5'], '--rear_noise is for --objective=rear, got --objective=mle'),
    (['--model=npp', '--rear=1', '--objective=cca'], '--rear is for --objective=rear, got --objective=cca'),
])
def test_what_does_not_fit_is_refused_in_one_line(capsys, flags, words):
    assert words in message(lambda: parse_training(flags), capsys)


def test_help_lists_what_a_family_allows(capsys):
    expected = dict(var='contrast_beta cca_lambda ddo_alpha', npp='contrast_beta cca_lambda ddo_alpha',
                    flexvar='contrast_beta cca_lambda ddo_alpha sar_sigma', flowar='')
    for model, names in expected.items():
        with pytest.raises(SystemExit):
            parse_training([f'--model={model}', '--help'])
        text = capsys.readouterr().out
        assert '--objective' in text
        for name in expected['flexvar'].split():
            assert (f'--{name}' in text) == (name in names.split()), (model, name)


def test_dropout_is_off_unless_a_flag_gives_it():
    with_reference = ['--objective=cca', '--init_from=f']
    assert parse_training(['--depth=24']).model_kwargs(1, 1)['drop_path_rate'] == pytest.approx(0.1)
    assert parse_training(with_reference).model_kwargs(1, 1)['drop_path_rate'] == 0
    assert parse_training([*with_reference, '--drop_path=0.2']).model_kwargs(1, 1)['drop_path_rate'] == 0.2
    npp = parse_training(['--model=npp', '--objective=cca', '--gpt_ckpt=f', '--patch_level=1',
                          '--dropout_p=0.1'])
    assert (npp.dropout_p, npp.token_dropout_p) == (0.1, 0)


def test_dropout_is_off_in_settings_from_python_unless_they_give_it():
    with_reference = dict(objective='cca', init_from='f')
    for cls in (VARConfig, FlexVARConfig):
        assert cls(depth=24).model_kwargs(1, 1)['drop_path_rate'] == pytest.approx(0.1)
        config = cls(**with_reference)
        assert config.drop_path == 0
        for given in (-1., 0.2):
            assert cls(**with_reference, drop_path=given).drop_path == given
            assert dataclasses.replace(config, drop_path=given).drop_path == given
    assert NPPConfig().token_dropout_p == 0.1
    npp = NPPConfig(**with_reference, patch_level=1, dropout_p=0.1)
    assert (npp.dropout_p, npp.token_dropout_p) == (0.1, 0)


def test_dropout_of_a_file_is_for_its_own_objective(tmp_path):
    """The settings of a plain training begin another one; those of the other one continue it."""
    def after(config, *flags):
        path = tmp_path / 'config.yaml'
        path.write_text(config_text(config, 'settings'))
        return parse_training([f'--config={path}', *flags])
    plain = parse_training(['--init_from=f'])
    assert after(plain).drop_path == -1
    contrast = after(plain, '--objective=cca')
    assert contrast.drop_path == 0
    assert after(contrast) == after(contrast, '--objective=cca') == contrast
    dropping = after(plain, '--objective=cca', '--drop_path=0.2')
    assert after(dropping, '--objective=cca').drop_path == 0.2


def test_the_rule_for_beta():
    assert advised_beta(680) == 0.02
    assert advised_beta(30) == pytest.approx(0.4533, rel=1e-3)


def test_the_name_of_the_reference():
    assert parse_training(['--init_from=f']).reference == ''
    assert parse_training(['--init_from=f', '--objective=cca']).reference == 'f'
    assert parse_training(['--init_from=f', '--ref_from=g', '--objective=cca']).reference == 'g'
    assert parse_training(['--ref_from=g', '--objective=ddo']).reference == 'g'
    assert parse_training(['--model=flowar']).reference == ''


def test_label_smoothing_is_no_part_of_a_likelihood():
    """The likelihood of given labels is that of the plain loss, in training mode, too."""
    tokenizer = VQVAE(**TINY_VQVAE)
    model = VAR(tokenizer, num_classes=3, depth=1, embed_dim=16, num_heads=2, patch_nums=(1, 2, 4),
                label_smooth=0.2, cond_drop_rate=0.9).train()
    tokens = list(torch.randint(32, (2, 21)).split([1, 4, 16], dim=1))
    label_B = torch.tensor([0, 2])
    teacher_BLZ = tokenizer.quantize.idxBl_to_var_input(tokens)
    logits_BLV = model.eval()(label_B, teacher_BLZ)
    expected_BL = -F.cross_entropy(logits_BLV.transpose(1, 2), torch.cat(tokens, 1), reduction='none')
    log_prob_BL, _ = model.train().log_probabilities(label_B, tokens)
    assert_within(log_prob_BL, expected_BL, 1e-6)
