"""What stands in for fields that a job leaves out: each default once, for the code and for the field's own text.

What is chosen from the model and the data is computed in the trainer's `sizing`, from the constants below.
"""

from typing import TypeVar

T = TypeVar("T")

RUNTIME = "default"
REGION = "us-east-1"

LOSS_ON = "Assistant"
LORA_RANKS = (16, 32, 64, 128)  # the smallest with enough weights is taken
CPT_LORA_RANKS = (64, 128)
LORA_ALPHA = 32
ADAPTER_MODE = "Continue"

DATASET_WEIGHT = 1.0
PAIRING = "BestVsWorst"
MAX_PAIRS_PER_PROMPT = 8
TEXT_SEQUENCE_LENGTH = 8192  # tokens of a piece of a long text at most
SFT_TOO_LONG = "Drop"
CPT_TOO_LONG = "Split"
MAX_TOO_LONG_FRACTION = 0.05
ON_BAD_ROW = "Fail"
PII_ACTION = "Report"
EXACT_COPIES = "Drop"
NEAR_COPIES = "Report"
CPT_NEAR_COPIES = "Drop"
SIMILARITY = 0.8
MAX_UNROLLED_FRACTION = 0.9  # of all tokens; conversations of some twenty answers of equal length repeat as much
MAX_BROKEN_FRACTION = 0.05
MAX_POOR_FRACTION = 0.1
SYSTEM_MESSAGES = "Keep"
SAME_ROLE_MESSAGES = "Keep"

# Preference methods. Rafailov et al. (2023) and TRL: beta 0.1; Meng et al. (2024): beta 2 and gamma / beta of a half;
# Hong et al. (2024): lambda 0.1; Ethayarajh et al. (2024): beta 0.1. Learning rates: ten times TRL's without LoRA.
DPO_LOSS = "Sigmoid"
DPO_BETA = 0.1
DPO_LABEL_SMOOTHING = 0.0
DPO_NLL_WEIGHT = 0.0
SIMPO_BETA = 2.0
SIMPO_GAMMA_SHARE = 0.5  # of beta
ORPO_LAMBDA = 0.1
KTO_BETA = 0.1
DPO_LEARNING_RATE = 1e-5
ORPO_LEARNING_RATE = 5e-5
PREFERENCE_SCHEDULE = "Linear"
PREFERENCE_EPOCHS = 1.0

MIN_EPOCHS = 1
MAX_EPOCHS = 10
BATCH_SIZES = (32, 16, 8, 4)  # the largest that leaves enough steps
WANTED_STEPS = 200
# "LoRA Without Regret" and the Tinker cookbook (2025): 5e-4 · (2000 / width)^p for families with a fitted p.
LEARNING_RATE = 5e-4
LEARNING_RATE_WIDTH = 2000
LEARNING_RATE_EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
OTHER_LEARNING_RATE = 2e-4
SHORT_RUN_STEPS = 100  # a shorter run gets a higher learning rate
SHORT_RUN_FACTOR = 1.5
WARMUP_RATIO = 0.03
SFT_SCHEDULE = "Linear"
CPT_SCHEDULE = "Cosine"
WEIGHT_DECAY = 0.0
SEED = 42

HOLDOUT_FRACTION = 0.02
MAX_HELD_OUT_ROWS = 2000
MIN_ROWS_TO_HOLD_OUT = 50  # of fewer distinct rows none are held out

CHECKPOINT_INTERVAL_S = 600
CHECKPOINTS_KEPT = 3
MAX_RETRIES = 3
MAX_DISRUPTIONS = 20
PROGRESS_DEADLINE_S = 1800
TTL_S = 86400
START_POLICY = "Automatic"


def given(value: T | None, default: T) -> T:
    """Return the value where the job gives one, 0 and false included, else the default."""
    return default if value is None else value
