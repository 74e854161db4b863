"""Actors on Ray: supervised workers, partition hosts and a distiller, real devices, and the scheduling of tasks on them.

Nothing outside this package imports Ray in ``actors``.

    RayPool
    ├── Scheduler          tasks from submission to result: queues, retries, lost plans
    ├── WorkerGroup        an ActorGroup of workers; its devices with nodes of their own are in a DeviceRegistry
    │   └── HangDetector   workers that are at one plan for too long
    └── PartitionHosts     an ActorGroup of partition hosts, and the calls to them
        └── Heartbeats     a HangDetector fed by heartbeats: hosts that do not answer
    RayDistiller           an ActorGroup of one distiller, and a HangDetector
    └── RequestQueue       the requests that it has not answered
"""
