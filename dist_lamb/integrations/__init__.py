"""What trainers need besides an optimizer. Each part needs the trainer's own package alone::

    from dist_lamb.integrations.trainer import ConsolidateOnSave        # Hugging Face Trainer
    Trainer(model, args, optimizers=(opt, None), callbacks=[ConsolidateOnSave()])

    from dist_lamb.integrations.accelerate import consolidate_on_save   # Accelerate
    consolidate_on_save(accelerator, opt)

Both are for :class:`dist_lamb.ShardedLamb`, whose state is sharded when a trainer asks for it, and
do nothing for :class:`dist_lamb.Lamb`. Resuming needs nothing: what was saved is whole.
"""
