"""Hugging Face's Trainer with Lamb: alone, under DDP, with FSDP2, or with DeepSpeed's JSON.

python launch/examples/trainer.py runs/trainer
torchrun --standalone --nproc-per-node 2 launch/examples/trainer.py runs/trainer
torchrun --standalone --nproc-per-node 2 launch/examples/trainer.py runs/trainer fsdp
torchrun --standalone --nproc-per-node 2 launch/examples/trainer.py runs/trainer deepspeed

Started again with the same folder, it goes on from its last checkpoint.
"""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from dist_lamb import Lamb

CONFIG = Path(__file__).with_name("trainer_deepspeed.json")


def main(folder: str, mode: str = "", steps: int = 40) -> Trainer:
    if mode == "deepspeed":
        from dist_lamb.deepspeed_adapter import register

        register()  # now DeepSpeed's JSON may name DeepSpeedLamb
    torch.manual_seed(0)
    size = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(intermediate_size=128, **size))
    text = torch.arange(256 * 16).view(256, 16) * 7 % 128
    data = [{"input_ids": row, "labels": row} for row in text]
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        weight_decay=0.01,  # of matrices; Trainer puts biases and norms in a group without
        save_steps=20,
        use_cpu=not torch.cuda.is_available() and mode != "deepspeed",
        logging_steps=5,
        report_to=[],
        fsdp=mode == "fsdp",
        fsdp_config={"version": 2} if mode == "fsdp" else None,
        deepspeed=str(CONFIG) if mode == "deepspeed" else None,
    )
    # The class, which Trainer calls after it has sharded the model; the lr schedule is its own.
    options = {} if mode == "deepspeed" else {"optimizer_cls_and_kwargs": (Lamb, {"lr": 1e-2})}
    trainer = Trainer(model, arguments, train_dataset=data, **options)
    last = get_last_checkpoint(folder) if Path(folder).exists() else None
    trainer.train(resume_from_checkpoint=last)
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
