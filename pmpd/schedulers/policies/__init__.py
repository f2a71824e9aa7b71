"""The schedulers that decide a sequence at a time, a module each; a file put here is found by its name.

A module has ``TRAINED``, the trained things that it needs (``network``, ``labels``), and ``build(setting, ...)``, whose
other arguments are what ``scheduler.options`` may set. ``conf/scheduler/NAME.yaml`` with ``kind: policy`` and
``policy: MODULE`` is then a scheduler like any other.
"""
