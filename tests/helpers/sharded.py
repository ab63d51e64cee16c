"""`train.py` under FSDP on a CPU, where accelerate does not offer it: the mechanics are the same over gloo."""

import sys

from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState

from stablevm import cli
from stablevm.training import trainer

plain = trainer.make_accelerator


def sharded(config):
    accelerator = plain(config)
    PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
    )
    return accelerator


if __name__ == "__main__":
    trainer.make_accelerator = sharded
    sys.exit(cli.train())
