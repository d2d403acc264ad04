"""The kinds of launchers: a row each, with what configuration has to know of it.

To add a launcher, say for Kubernetes: write its class, a `flows.launch.launcher.Launcher`, in a file of its own, and
add a row here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class LauncherKind:
    """A way to start ranks.

    launcher: where its class is, module:class; it is imported when it is first used.
    description: how it starts ranks, for the user.
    sees_devices: whether ranks run on this host, or on hosts like it, so that this host's devices and memory tell what
        they have. If not, the configuration has to name the device.
    is_joined: whether several hosts have to join by `reprise join`, which need launch.rendezvous to meet.
    """

    launcher: str
    description: str
    sees_devices: bool
    is_joined: bool


LAUNCHER_KINDS = {
    "local": LauncherKind(
        launcher="flows.launch.local:LocalLauncher",
        description="torchrun here, and on the hosts that `reprise join` it",
        sees_devices=True,
        is_joined=True,
    ),
    "slurm": LauncherKind(
        launcher="flows.launch.slurm:SlurmLauncher", description="sbatch", sees_devices=False, is_joined=False
    ),
}
