"""The kinds of launchers: one row each, with the properties that the configuration depends on.

To add a launcher, write a subclass of `flows.launch.launcher.Launcher` in a new file, and
add a row here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class LauncherKind:
    """A kind of launcher.

    launcher: its class, as module:class; it is imported at first use.
    description: how it starts ranks, for the user.
    sees_devices: whether ranks run on this host or on hosts like it, so that this host's devices and memory represent
        theirs. If not, the configuration has to name the device.
    is_joined: whether other hosts join with `reprise join`, which requires launch.rendezvous.
    """

    launcher: str
    description: str
    sees_devices: bool
    is_joined: bool


LAUNCHER_KINDS = {
    "local": LauncherKind(
        launcher="flows.launch.local:LocalLauncher",
        description="torchrun on this host, and on the hosts that `reprise join` it",
        sees_devices=True,
        is_joined=True,
    ),
    "slurm": LauncherKind(
        launcher="flows.launch.slurm:SlurmLauncher", description="sbatch", sees_devices=False, is_joined=False
    ),
    "ray": LauncherKind(
        launcher="flows.launch.ray_launcher:RayLauncher",
        description="nodes of a Ray cluster",
        sees_devices=False,
        is_joined=False,
    ),
}
