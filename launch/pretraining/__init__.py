"""The parts of ``launch/pretrain.py``, one idea a file.

====================  ==========================================================================
``config``            the TOML file as frozen dataclasses; every wrong key or value has a message
``sources``           which files are the text, and which of them are held out
``tokens``            WordPiece tokenizer and token cache
``masking``           15 % masking as a pure function of (seed, epoch, sequence)
``batches``           global batches cut into ranks and micro-batches; resumable position
``model``             BERT whose head runs on the masked positions alone
``engines``           how gradients and optimizer state are spread over ranks
``ranks``             process group, device, threads
``checkpoint``        save and resume
``report``            progress bar, JSON lines, TensorBoard
``curves``            the picture at the end
====================  ==========================================================================
"""
