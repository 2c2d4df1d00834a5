"""The run around train.py's loop: what is trained, how it steps, when it saves, evaluates and
stops.
"""
