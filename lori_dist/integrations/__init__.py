"""Other programs' forms of an adapter, and other programs' training loops.

Exports: peft.py (a PEFT LoRA folder), official.py (the layout of LoRI's official code), folded.py (a model folder with
the adapter in its weights), each with the card that model_card.py writes. For loops of one's own: peft_tuner.py
(`LoriConfig`, LoRI as a method of PEFT) and deepspeed.py (`init_distributed`). Files that begin with an underscore are
private; peft is imported in peft_tuner.py and _by_peft.py alone. Nothing in `lori run` needs peft.
"""
