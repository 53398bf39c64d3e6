"""What the processes of tests/distributed/test_watchdog.py do. They are forked from one that has imported torch."""

import os
import sys
import time

import torch
import torch.distributed as dist
from helpers.short_runs import WITHOUT_PICTURES

import train
from softprompt.cli import run_command
from softprompt.distributed import watchdog
from softprompt.distributed.process_group import process_group
from softprompt.utils.errors import DataError

LONG = 600.0  # seconds in which a test is over


def store(told):
    """torchrun's agent, as far as ranks know it."""
    served = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    told.send(served.port)
    time.sleep(LONG)


def rank(number, size, port, folder, silence, main, *given):
    """A rank that torchrun started; what it prints goes into files."""
    told = {"RANK": number, "WORLD_SIZE": size, "LOCAL_RANK": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in told.items()} | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}-{number}", os.O_WRONLY | os.O_CREAT), descriptor)
    torch.set_num_threads(1)
    watchdog.BEAT_SECONDS, watchdog.SILENCE_SECONDS = silence / 10, silence
    sys.argv = ["train.py", *map(str, given)]
    run_command(lambda argv: main(folder, *given))


def trains_here(folder, *flags):
    """A run of train.py with these flags."""
    sys.modules |= WITHOUT_PICTURES
    train.main([str(flag) for flag in flags])


def ready(world, folder):
    world.all_gather("here")
    (folder / f"ready-{world.rank}").touch()


def waits(folder, waiting):
    """One is where nothing ends it, as NCCL's collectives are, and the others wait for it in one of gloo's."""
    with process_group() as world:
        print("told before")
        ready(world, folder)
        if world.rank == waiting:
            time.sleep(LONG)
        world.all_gather("never")


def late(folder, seconds):
    """The others wait for one that is alive, then one ends before the others."""
    with process_group() as world:
        ready(world, folder)
        time.sleep(seconds * world.rank)
        world.all_gather("at last")
        if world.is_main:
            time.sleep(seconds)


def fails(folder, fault):
    """One ends with a fault, of which the others' main threads hear nothing."""
    with process_group() as world:
        ready(world, folder)
        if world.rank == 1:
            raise fault
        time.sleep(LONG)


def trains(folder, *argv):
    """In a folder of its own, with its own copy of the rows, which only differ once they have been hashed."""
    import train
    from softprompt.data import stream_sources as sources

    hashed = sources._hashed
    sources._hashed = lambda path: ("0" * 64, hashed(path)[1])
    os.chdir(folder / os.environ["RANK"])
    train.main([*argv])


FAULTS = {"data": DataError("rows.jsonl, line 7:\nwrong"), "system": OSError(5, "Input/output error", "rows.jsonl")}
