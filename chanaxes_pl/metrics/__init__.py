"""The metrics: moments in, nats out, one a file."""

from chanaxes_pl.metrics.input_capture import input_capture
from chanaxes_pl.metrics.peer_overlap import peer_overlap
from chanaxes_pl.metrics.peer_reconstruction import PeerReconstruction, peer_r2, peer_reconstruction
from chanaxes_pl.metrics.target_excess import target_excess
from chanaxes_pl.metrics.task_information import task_information

#: Local axis: moments of a layer's channels over local samples → ``[C]``.
LOCAL_METRICS = {"input_capture": input_capture, "peer_overlap": peer_overlap}
#: Target axis: association of a layer's channels with the target over image samples → ``[C]``.
TARGET_METRICS = {"task_information": task_information, "target_excess": target_excess}
#: The four metrics that make up the two axes.
METRICS = LOCAL_METRICS | TARGET_METRICS

__all__ = [
    "LOCAL_METRICS",
    "METRICS",
    "TARGET_METRICS",
    "PeerReconstruction",
    "input_capture",
    "peer_overlap",
    "peer_r2",
    "peer_reconstruction",
    "target_excess",
    "task_information",
]
