"""What a person sees: our own lines and one live bar that goes when its work is done. Our choice.

Libraries have their say only with SIDTUNE_VERBOSE=1. Where the console is no terminal (a file, a CI), there are no bars. A step of
a pipeline writes its lines into `logs/` of the pipeline's folder; on the console are its bar and its warnings.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

VERBOSE_VARIABLE, LOGGED_VARIABLE, TRACKER_VARIABLE = "SIDTUNE_VERBOSE", "SIDTUNE_LOGGED", "SIDTUNE_REPORT_TO"
_CHATTY = (
    "httpx", "httpcore", "faiss", "matplotlib", "bm25s", "absl", "torch", "transformers", "trl", "accelerate", "datasets",
    "DeepSpeed",
)  # fmt: skip


def quiet() -> None:
    """Lines of sidtune go to stderr; libraries are told to be quiet, before they are imported. For the start of a command."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin slow each other down on a busy machine
    console = logging.StreamHandler()
    handlers = [console]
    if LOGGED_VARIABLE in os.environ:  # standard output is the log of this step
        handlers.append(logging.StreamHandler(sys.stdout))
        console.setLevel(logging.WARNING)
        os.environ.setdefault("TQDM_DESC", os.environ[LOGGED_VARIABLE])  # its bars carry its name
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers)
    if os.environ.get(VERBOSE_VARIABLE, "0") != "0":
        return
    os.environ.setdefault("TQDM_LEAVE", "")  # tqdm reads its defaults from here; a bar goes when its work is done
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for one in (*handlers, logging.getLogger("DeepSpeed")):  # which has a handler of its own, and sets its level later
        one.addFilter(_is_ours_or_an_error)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", category=UserWarning, module=r"(sidtune\.|__main__)")
        warnings.showwarning = lambda message, *_, **__: logging.getLogger("sidtune").warning("%s", message)


def _is_ours_or_an_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or record.name.partition(".")[0] not in _CHATTY
