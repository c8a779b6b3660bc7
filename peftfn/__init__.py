"""peftfn: parameter-efficient fine-tuning as pure functions on `torch.func`."""

from peftfn.analysis import curvature, laplace
from peftfn.checkpoints.checkpoint import load, push_to_hub, save
from peftfn.checkpoints.load_stack import load_stack
from peftfn.checkpoints.load_with_model import load_with_model
from peftfn.checkpoints.merge_folder.merging import merge_folder
from peftfn.core.adapter import Adapter, leaves
from peftfn.core.config import PeftConfig
from peftfn.core.parameter_count import Count, count
from peftfn.methods.adalora_config import AdaLoraConfig
from peftfn.methods.adaption_prompt import AdaptionPromptConfig
from peftfn.methods.beft import BeftConfig
from peftfn.methods.boft import BOFTConfig
from peftfn.methods.c3a import C3AConfig
from peftfn.methods.deft import DeftConfig
from peftfn.methods.delora import DeloraConfig
from peftfn.methods.fourierft import FourierFTConfig
from peftfn.methods.frod import FrodConfig
from peftfn.methods.glora import GloraConfig
from peftfn.methods.gralora import GraloraConfig
from peftfn.methods.hira import HiraConfig
from peftfn.methods.hra import HRAConfig
from peftfn.methods.ia3 import IA3Config
from peftfn.methods.ln_tuning import LNTuningConfig
from peftfn.methods.loha import LoHaConfig
from peftfn.methods.lokr import LoKrConfig
from peftfn.methods.lora import LoraConfig
from peftfn.methods.miss import MissConfig
from peftfn.methods.oft import OFTConfig
from peftfn.methods.osf import OSFConfig
from peftfn.methods.peanut import PeanutConfig
from peftfn.methods.prompt.cartridge import CartridgeConfig
from peftfn.methods.prompt.cpt import CPTConfig
from peftfn.methods.prompt.multitask_prompt_tuning import MultitaskPromptTuningConfig
from peftfn.methods.prompt.p_tuning import PromptEncoderConfig
from peftfn.methods.prompt.prefix_tuning import PrefixTuningConfig
from peftfn.methods.prompt.prompt_config import PromptLearningConfig
from peftfn.methods.prompt.prompt_tuning import PromptTuningConfig
from peftfn.methods.psoft import PsoftConfig
from peftfn.methods.pvera import PveraConfig
from peftfn.methods.randlora import RandLoraConfig
from peftfn.methods.road import RoadConfig
from peftfn.methods.shira import ShiraConfig
from peftfn.methods.supertuning import SupertuningConfig
from peftfn.methods.trainable_tokens import TrainableTokensConfig
from peftfn.methods.vblora import VBLoRAConfig
from peftfn.methods.vera import VeraConfig
from peftfn.methods.waveft import WaveFTConfig
from peftfn.models.replicated_layers import replicate_layers
from peftfn.ops.combine import combine
from peftfn.ops.init import init
from peftfn.ops.kbit import prepare_for_kbit_training
from peftfn.ops.merge import merge
from peftfn.ops.stacking import stack, unstack
from peftfn.ops.weight_inits import loftq, olora, pissa
from peftfn.runtime import cartridge
from peftfn.runtime.apply import apply
from peftfn.runtime.bind.bound import bind, unbind
from peftfn.runtime.ensemble import Ensemble, ensemble
from peftfn.training import adalora, cpt, kasa, optimizers, sweep

__version__ = "0.1.0"

__all__ = [
    "AdaLoraConfig",
    "Adapter",
    "AdaptionPromptConfig",
    "BOFTConfig",
    "BeftConfig",
    "C3AConfig",
    "CPTConfig",
    "CartridgeConfig",
    "Count",
    "DeftConfig",
    "DeloraConfig",
    "Ensemble",
    "FourierFTConfig",
    "FrodConfig",
    "GloraConfig",
    "GraloraConfig",
    "HRAConfig",
    "HiraConfig",
    "IA3Config",
    "LNTuningConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "MissConfig",
    "MultitaskPromptTuningConfig",
    "OFTConfig",
    "OSFConfig",
    "PeanutConfig",
    "PeftConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PsoftConfig",
    "PveraConfig",
    "RandLoraConfig",
    "RoadConfig",
    "ShiraConfig",
    "SupertuningConfig",
    "TrainableTokensConfig",
    "VBLoRAConfig",
    "VeraConfig",
    "WaveFTConfig",
    "adalora",
    "apply",
    "bind",
    "cartridge",
    "combine",
    "count",
    "cpt",
    "curvature",
    "ensemble",
    "init",
    "kasa",
    "laplace",
    "leaves",
    "load",
    "load_stack",
    "load_with_model",
    "loftq",
    "merge",
    "merge_folder",
    "olora",
    "optimizers",
    "pissa",
    "prepare_for_kbit_training",
    "push_to_hub",
    "replicate_layers",
    "save",
    "stack",
    "sweep",
    "unbind",
    "unstack",
]
