"""Getting a model: the one that ships with the package, or any other.

The bundled model is a Llama of 7.3 million parameters that writes Python, trained by `qlearn/training/pretrain.py`.
It lies in `qlearn/models/bundled/` in transformers' own format, so it is loaded by transformers, like every other
model, and nothing is fetched.

Any other causal language model is named by a folder, or by its id on the Hugging Face hub. A model that was quantized
and saved is a folder like any other, and comes back quantized (`plugin.py`). What is in the local cache
is taken from there. For the rest the hub is asked once, with a short time limit, whether it is there and has the
model; only then is it downloaded.
"""

import contextlib
from pathlib import Path

import torch

from qlearn.models.storage import CheckpointError

BUNDLED = Path(__file__).parent / "bundled"
HUB_TIMEOUT = 10  # seconds to wait for the hub's first answer


def load_model(name_or_path=None, dtype=torch.float32, progress=True):
    """A causal language model and its tokenizer.

    name_or_path: None for the bundled model; else a folder, or an id on the Hugging Face hub such as "Qwen/Qwen3-0.6B".
    dtype: the type to compute in; float32 is the fastest on a CPU.
    progress: show bars while another model is fetched and loaded.
    Returns (model in eval mode, without gradients, on the CPU; tokenizer).
    Raises OSError, in one sentence, when the model cannot be had, and ValueError when what is there is no model.

    >>> model, tokenizer = load_model()
    >>> type(model).__name__, sum(p.numel() for p in model.parameters())
    ('LlamaForCausalLM', 7344384)
    """
    if name_or_path is None:
        return _load(BUNDLED, dtype, progress=False)
    if Path(name_or_path).is_dir():
        return _load(name_or_path, dtype, progress)
    if Path(name_or_path).is_absolute() or str(name_or_path).startswith("."):
        raise FileNotFoundError(
            f"there is no folder {str(name_or_path)!r}; give an existing one, or an id such as 'Qwen/Qwen3-0.6B'"
        )
    with contextlib.suppress(OSError):  # not in the cache, or not all of it
        return _load(name_or_path, dtype, progress)
    _ask_hub(name_or_path)
    return _load(name_or_path, dtype, progress, local_files_only=False)


def _load(name_or_path, dtype, progress, local_files_only=True):
    """Load with transformers, whose errors run over many lines, and say each in one."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _progress_bars(progress):
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, local_files_only=local_files_only)
            model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, local_files_only=local_files_only)
    except CheckpointError:  # says it in one sentence already
        raise
    except SafetensorError as error:
        raise ValueError(f"a weight file of {str(name_or_path)!r} is incomplete ({error}); fetch it again") from error
    except OSError as error:
        raise OSError(
            f"the model {str(name_or_path)!r} is not complete ({_first_line(error)}); fetch all of its files, and if "
            "it asks for consent, give it on the hub's page and log in"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{str(name_or_path)!r} is no causal language model ({_first_line(error)}); name another one"
        ) from error
    except RuntimeError as error:
        raise ValueError(
            f"the weights of {str(name_or_path)!r} do not fit its config.json ({_first_line(error)}); fetch both again"
        ) from error
    return model.eval().requires_grad_(False), tokenizer


def _ask_hub(name):
    """Raise OSError, saying why and what to do, unless the hub has a model of that name."""
    from huggingface_hub import model_info
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        model_info(name, timeout=HUB_TIMEOUT)
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise OSError(
            f"there is no model {name!r}, neither a folder here nor on the Hugging Face hub; check the spelling, and "
            "log in if it is private"
        ) from error
    except Exception as error:  # no network, a proxy, offline mode: the client has an exception for each
        raise OSError(
            f"the model {name!r} is not on this machine and the Hugging Face hub cannot be reached; connect and try "
            "again, give the path of a folder, or use load_model() for the bundled model, which needs no network"
        ) from error


@contextlib.contextmanager
def _progress_bars(shown):
    """Switch transformers' progress bars on or off, and back again."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        yield
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def _first_line(error):
    return str(error).strip().splitlines()[0].rstrip(".:")
