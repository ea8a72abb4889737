# SPDX-License-Identifier: Apache-2.0
# The losses that goldens are made of: TRL's names for them, and ours. Needs neither torch nor JAX.

ROWS, LENGTH = 6, 7
CAP = 1.5  # of old / sampler, in the cases that correct the sampler

TRL = {
    "grpo": dict(loss_type="grpo"),
    "grpo_kl": dict(loss_type="grpo", beta=0.1),
    "bnpo_clip_higher": dict(loss_type="bnpo", epsilon_high=0.28),
    "dapo": dict(loss_type="dapo", epsilon_high=0.28),
    "dapo_kl": dict(loss_type="dapo", beta=0.05),
    "dr_grpo": dict(loss_type="dr_grpo"),
    "dr_grpo_kl": dict(loss_type="dr_grpo", beta=0.1),
    "dual": dict(loss_type="grpo", delta=1.6),
    "gspo": dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-2, epsilon_high=4e-2),
    "cispo": dict(loss_type="cispo", epsilon_high=1.4),
    "corrected": dict(loss_type="dapo", corrected=True),
    "corrected_kl": dict(loss_type="grpo", corrected=True, beta=0.1),
}
OURS = {
    "grpo": dict(),
    "grpo_kl": dict(beta=0.1),
    "bnpo_clip_higher": dict(normaliser="tokens", clip=dict(high=0.28)),
    "dapo": dict(normaliser="tokens", clip=dict(high=0.28)),
    "dapo_kl": dict(normaliser="tokens", beta=0.05),
    "dr_grpo": dict(normaliser="constant"),
    "dr_grpo_kl": dict(normaliser="constant", beta=0.1),
    "dual": dict(clip=dict(dual=1.6)),
    "gspo": dict(ratio="sequence", clip=dict(low=3e-2, high=4e-2)),
    "cispo": dict(normaliser="tokens", clip=dict(form="weight", low=1.0, high=0.4)),
    "corrected": dict(normaliser="tokens", importance_cap=CAP),
    "corrected_kl": dict(importance_cap=CAP, beta=0.1),
}
