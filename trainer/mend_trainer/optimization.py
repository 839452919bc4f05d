"""AdamW, its learning rate over steps, and the scale of the loss under float16."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from mend_trainer.config import OptimizerConfig, ParallelConfig, ScheduleConfig, TrainConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW; matrices decay, the scales of norms do not."""
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [each for each in parameters if each.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [each for each in parameters if each.ndim < 2], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


def make_scaler(device: torch.device, parallel: ParallelConfig, config: OptimizerConfig) -> torch.amp.GradScaler:
    """The scale of the loss under float16, whose gradients would vanish without one; otherwise it does nothing."""
    return torch.amp.GradScaler(device.type, init_scale=config.loss_scale, enabled=parallel.precision == "float16")


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig) -> LambdaLR:
    """The schedule over all of the run's steps."""
    return LambdaLR(optimizer, lambda step: learning_rate_factor(config.schedule, step, config.steps))


def learning_rate_factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """What the learning rate is multiplied by in `step` (from 0) of `steps`."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "wsd":
        left = steps - step
        if left >= schedule.decay_steps:
            return 1.0
        return schedule.final_fraction + (1 - schedule.final_fraction) * left / schedule.decay_steps
    done = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
    return schedule.final_fraction + (1 - schedule.final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
