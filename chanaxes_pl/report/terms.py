"""What the words of the page mean, so that it can be read without any other text."""

from __future__ import annotations

TERMS = {
    "channel, peer": "one output of a tracked layer; another output of the same layer",
    "probe": "fixed labelled images on which the metrics are measured",
    "input capture": "local axis, nats: ½ ln(1 + variance of the channel's output / the layer's median variance); half "
    "of a layer's channels are above ½ ln 2 = 0.347",
    "peer overlap": "local axis, nats: mean over peers of −½ ln(1 − r²), r the correlation of both outputs",
    "peer R²": "local axis: share of the channel's variance that ridge regression on all peers explains",
    "hull size, hull score": "local axis: how many peers reach 95 % of peer R² (at most 10); peer R² divided by that",
    "task information": "target axis, nats: −½ ln(1 − r²), r the correlation of the channel's image mean with the task "
    "variable, for classes the logit margin of the right one",
    "target excess": "target axis, nats: information of a pair of channels about the task variable less that of the "
    "better one, mean over the 10 best peers",
    "local axis, target axis": "mean z-scores within a layer of input capture and peer overlap; of task information "
    "and target excess",
    "ρ": "Spearman's rank correlation over the channels of a layer, by default of input capture and task information; "
    "of a network the mean over layers",
    "null": "ρ with a random target: what chance alone can give",
    "ceiling": "highest ρ that the metrics' split-half reliability allows",
    "lesion": "one channel replaced by zero, by its mean, or by a prediction from its peers; no weight changes",
    "damage": "rise of the test loss by a lesion, nats",
    "MACs": "multiply–accumulates of one image",
    "refit": "new weights whose outputs come closest to those of the whole network, without labels",
}
