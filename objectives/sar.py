"""SAR: FlexVAR learns to go on from its own predictions, as it does when it draws.

Teacher forcing shows the model true codes alone. Here a second pass sees what the first one has predicted,
and is to predict what the first one did: true codes would contradict a context that is not true.
Letters: B batch, L all tokens, l tokens of one scale, V vocabulary, Z tokenizer channels, 3HW image.
Source: arXiv 2512.06421.
"""
from collections.abc import Callable
from typing import Any

import torch

from configs import GeneratorConfig
from models import FlexVAR
from models.helpers import TokenLosses, draw_codes, guide, token_losses
from models.noise import noise_of_step
from models.scales import ScaleLayout
from objectives.base import Objective


class SAR(Objective):
    """`--objective=sar`: the model's own loss, plus sigma times the cross-entropy of the second pass.

    Args:
        sigma: weight of the second pass.
        scope: 'last' shows the second pass the last scale but one and asks for the last one, as published;
            'all' shows all predictions but those of the last scale and asks for all scales but the first.
        target: 'teacher', predictions of the first pass, or 'real' codes.
        draws: whether predictions are drawn, with guidance; else they are the likeliest codes.
        cfg, top_k, top_p: of these draws.
    """

    headline = {'Ls': 'L_student'}
    legend = 'Ls is the cross-entropy of the pass that sees predictions'

    def __init__(self, sigma: float = 0.01, scope: str = 'last', target: str = 'teacher', draws: bool = False,
                 cfg: float = 2.5, top_k: int = 900, top_p: float = 0.96):
        super().__init__()
        self.sigma = sigma
        self.scope = scope
        self.target = target
        self.draws = draws
        self.cfg = cfg
        self.top_k = top_k
        self.top_p = top_p

    @classmethod
    def from_config(cls, config: GeneratorConfig) -> 'SAR':
        return cls(config.sar_sigma, config.sar_scope, config.sar_target, config.sar_sample, config.sar_cfg,
                   config.sar_top_k, config.sar_top_p)

    def loss(self, model: FlexVAR, images_B3HW: torch.Tensor, label_B: torch.Tensor,
             progress: float) -> tuple[torch.Tensor, dict[str, Any]]:
        # 1. Teacher forcing, the model's own loss, and which codes it predicts; these have no gradient.
        loss, aux = model.training_loss(images_B3HW, label_B, progress)
        sides = aux['patch_nums']
        lengths = ScaleLayout(tuple(sides)).lengths
        if len(sides) == 1:
            return loss, aux | dict(student_loss=torch.zeros_like(loss), num_student_tokens=0)
        real_kBl = aux['target_BL'].split(lengths, dim=1)
        predicted_kBl = aux['losses'].predicted_BL.split(lengths, dim=1)
        if self.draws:
            predicted_kBl = self.drawn(model, aux['label_B'], real_kBl, sides)

        # 2. The pass that sees them, with the same dropped labels.
        target_kBl = predicted_kBl if self.target == 'teacher' else real_kBl
        student = self.student_last if self.scope == 'last' else self.student_all
        losses = student(model, aux['label_B'], predicted_kBl, target_kBl, sides)
        student_loss = losses.loss_BL.mean()
        aux |= dict(student_loss=student_loss.detach(), num_student_tokens=1 + losses.loss_BL.shape[1])
        return loss + self.sigma * student_loss, aux

    def student_last(self, model: FlexVAR, label_B: torch.Tensor, seen_kBl: tuple[torch.Tensor, ...],
                     target_kBl: tuple[torch.Tensor, ...], sides: tuple[int, ...]) -> TokenLosses:
        """Losses (B, l) of the last scale, of which the student sees its class and its input alone."""
        before, last = ((side, side) for side in sides[-2:])
        with torch.autocast(label_B.device.type, enabled=False):
            student_BlZ = model.next_input(seen_kBl[-2], before, last)
        # Upstream parity: the token of the class lacks pos_start here.
        h_BLC = model.before_head(label_B, student_BlZ, (1, sides[-1]), has_start=False)
        return token_losses(model.head, h_BLC[:, 1:], target_kBl[-1])

    def student_all(self, model: FlexVAR, label_B: torch.Tensor, seen_kBl: tuple[torch.Tensor, ...],
                    target_kBl: tuple[torch.Tensor, ...], sides: tuple[int, ...]) -> TokenLosses:
        """Losses (B, L - 1) of all scales but the first, each after the predictions of those before it."""
        student_BLZ = model.teacher_input(list(seen_kBl), sides)
        h_BLC = model.before_head(label_B, student_BLZ, sides)
        return token_losses(model.head, h_BLC[:, 1:], torch.cat(target_kBl[1:], dim=1))

    @torch.no_grad()
    def drawn(self, model: FlexVAR, label_B: torch.Tensor, real_kBl: tuple[torch.Tensor, ...],
              sides: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        """Codes (B, l) of every scale, drawn under guidance from what teacher forcing predicts.

        As published, logits are (1 + t) cond - t uncond with t = cfg / 2 * (1 + k / (K - 1)).
        """
        layout = ScaleLayout(tuple(sides))
        teacher_BLZ = model.teacher_input(list(real_kBl), sides)
        null_B = torch.full_like(label_B, model.num_classes)
        cond_BLC = model.before_head(label_B, teacher_BLZ, sides)
        uncond_BLC = model.before_head(null_B, teacher_BLZ, sides)
        noise = noise_of_step(len(label_B))
        top_k = min(self.top_k, model.V)
        codes_kBl = []
        for k, (begin, end) in enumerate(layout.spans):
            strength = self.cfg * 0.5 * (1 + layout.ratio(k))
            cond_BlV = model.head(cond_BLC[:, begin:end]).float()
            uncond_BlV = model.head(uncond_BLC[:, begin:end]).float()
            logits_BlV = guide(cond_BlV, uncond_BlV, 1 + strength)
            codes_kBl.append(draw_codes(logits_BlV, top_k, self.top_p, noise))
        return tuple(codes_kBl)

    def metrics(self, model: FlexVAR, aux: dict[str, Any]) -> dict[str, torch.Tensor]:
        return model.metrics(aux) | dict(L_student=aux['student_loss'])

    def flops(self, flops_of_image: Callable[[int], int], aux: dict[str, Any]) -> int:
        """Both passes; of drawn predictions, two more without gradients."""
        of_teacher = super().flops(flops_of_image, aux)
        of_draws = of_teacher * 2 // 3 if self.draws else 0
        return of_teacher + of_draws + flops_of_image(aux['num_student_tokens'])
