"""Memory budgets that hold: plans run in a child process of the worker, under a limit on its data segment.

    worker (Ray, or the run's own process)          child (no Ray)
    EnforcedDevice.run  -- plan, packets, state -->  Device.run under RLIMIT_DATA = idle + budget
                        <-- report, update, state --

``data_segment`` measures and limits, ``child`` is the process, ``child_process`` its handle in the worker, ``probe`` finds by
bisection how much memory a plan needs. docs/memory.md describes the whole.
"""
