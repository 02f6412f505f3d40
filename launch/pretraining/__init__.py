"""The parts of ``launch/pretrain.py``, one topic a file.

====================  ==========================================================================
``config``            the TOML file as frozen dataclasses; every wrong key or value has a message
``sources``           which files are the text, and which of them are held out
``tokens``            WordPiece tokenizer and token cache
``disk``              synced files, a lock, file versions that were compared with their digests
``masking``           15 % masking as a pure function of (seed, epoch, sequence)
``batches``           global batches cut into ranks and micro-batches; resumable position
``model``             BERT whose head runs on the masked positions alone
``engines``           how gradients and optimizer state are spread over ranks: the registry
``engine_<name>``     an engine; ``engine_base`` is the interface that the training loop uses
``ranks``             process group, device, threads, signals
``checkpoint``        save and resume, at any number of ranks
``schedule``          the lr and the warm-up at this batch
``report``            progress bar, JSON lines, TensorBoard
``jsonlines``         files of rows that a resumed run continues
``telemetry``         norms of every weight matrix, their heat map, the gradient noise scale
``skips``             steps that the optimizer skipped for gradients that are not finite
``curves``            the chart at the end
``summary``           what a run says of itself as it starts and once it is done
====================  ==========================================================================
"""

from importlib.util import find_spec

#: What the extra ``pretrain`` installs; without it the error would name whatever comes first.
PACKAGES = ("matplotlib", "rich", "tensorboard", "tokenizers", "transformers")

_missing = [name for name in ("torch", "dist_lamb", *PACKAGES) if find_spec(name) is None]
if _missing:
    raise ModuleNotFoundError(
        f"{', '.join(_missing)} not installed; in the repository: pip install -e '.[pretrain]'",
        name=_missing[0],
    )
