"Self-teachers that cost less than the default: candidates in `worth.py`"
import torch
from torch import nn
from fastai.basics import F
from frskd_fastai.all import *
from frskd_fastai.method.teacher import _node, _project, _up

def pooled(feats):
    "Concatenate each level's mean and maximum over the positions: B×Σ 2·c_i"
    flat = [f.flatten(2) for f in feats]
    return torch.cat([o for f in flat for o in (f.mean(2),f.amax(2))], dim=1)

def means(maps):
    "Concatenate the maps' means over the positions: B×Σ c_i"
    return torch.cat([m.mean((2,3)) for m in maps], dim=1)

def mlp(ni, hidden, depth):
    "Build BatchNorm, then `depth` layers of `hidden` units"
    layers = [nn.BatchNorm1d(ni)]
    for a,b in zip([ni]+[hidden]*depth, [hidden]*depth):
        layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)

class PooledSelfTeacher(nn.Module):
    "Classifies the pooled maps; returns the student's maps unrefined, so use it with `beta=0`"
    def __init__(self, channels, n_out, hidden=1024, depth=2):
        super().__init__()
        self.layers = nn.Sequential(mlp(2*sum(channels), hidden, depth), nn.Linear(hidden, n_out))

    def forward(self, feats, preact=False): return feats,self.layers(pooled(feats))

class GatedSelfTeacher(nn.Module):
    "A `PooledSelfTeacher` whose refined maps are the student's, each channel times a gate"
    def __init__(self, channels, n_out, hidden=1024, depth=2):
        super().__init__()
        self.channels = channels
        self.layers = mlp(2*sum(channels), hidden, depth)
        self.gates = nn.Linear(hidden, sum(channels))
        self.head = nn.Linear(hidden+2*sum(channels), n_out)
        self.norm = nn.BatchNorm1d(2*sum(channels))

    def forward(self, feats, preact=False):
        vectors = pooled(feats)
        hidden = self.layers(vectors)
        gates = (2*self.gates(hidden).sigmoid()).split(self.channels, dim=1)
        # Gates are positive, so a gated map's mean and maximum are the map's, times the gate
        gated = vectors*torch.cat([o for g in gates for o in (g,g)], dim=1)
        refined = [f*g[...,None,None] for f,g in zip(feats, gates)]
        return refined,self.head(torch.cat([hidden, self.norm(gated)], dim=1))

class TopDownSelfTeacher(nn.Module):
    "The pyramid's top-down pass only; the head reads the means of all its maps"
    def __init__(self, channels, n_out, width=1., depth=1):
        super().__init__()
        d = [max(1, round(width*c)) for c in channels]
        self.laterals = nn.ModuleList(map(_project, channels, d))
        self.up = nn.ModuleList(map(_project, d[1:], d))
        self.nodes = nn.ModuleList(_node(o, depth) for o in d[:-1])
        self.head = nn.Linear(sum(d), n_out)

    def forward(self, feats, preact=False):
        feats = [f.contiguous(memory_format=torch.channels_last) for f in feats]
        maps = [lateral(f) for lateral,f in zip(self.laterals, feats)]
        for i in reversed(range(len(self.up))):
            maps[i] = F.relu(self.nodes[i](maps[i]+_up(self.up[i](maps[i+1]), maps[i].shape[-2:])))
        return maps,self.head(means(maps))

class AllMapsSelfTeacher(SelfTeacher):
    "The default self-teacher, with a head that reads the means of all refined maps instead of the last one's"
    def __init__(self, channels, n_out, width=2., depth=1):
        super().__init__(channels, n_out, width, depth)
        self.head = nn.Linear(sum(self.channels), n_out)

    def forward(self, feats, preact=False):
        feats = [f.contiguous(memory_format=torch.channels_last) for f in feats]
        maps,pre = self.layers[0](feats, preact)
        return (pre if preact else maps),self.head(means(maps))

class EverySecondStep(FRSKDCallback):
    """FRSKD in every second step only.

    In the other steps the self-teacher's gradient is zero, and Adam moves it by its running averages: 1.4 times as far
    in two steps as in one step with a constant gradient."""
    def after_loss(self):
        if self.learn.train_iter%2==0: super().after_loss()
