"""What `python -m llava_min doctor` knows: the settings of four tools as the same facts, and rules.

shell.py, files.py   inputs -> runs: each setting with its line
facts.py             one vocabulary for LLaVA, transformers/TRL/PEFT, and our train.py
ours.py, lora.py, numbers.py, data.py, saving.py   the rules, a function each
rules.py             their table, and what compares several inputs
translate.py         a LLaVA launch script as a train.py command
"""
