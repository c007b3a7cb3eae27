"""LoRI as a method of PEFT: `get_peft_model(model, LoriConfig(...))`, and all that PEFT does with its adapters.

Importing this file makes the method known to PEFT. PEFT's own `register_peft_method` takes only the names in its closed
`PeftType`, so the method is entered in the tables which that function fills.

What is saved holds no A: the kept entries of B, their positions where B is sparse, and in adapter_config.json the seed
and a checksum of each A, which is compared on load.

Of PEFT 0.21.2's own generic tests (tests/test_custom_models.py, with LoRI on `nn.Linear` and `Conv1D`, and B given
random values as they expect), 201 pass:

| what | result |
|---|---|
| save, load, roundtrips (also injected directly, under FSDP, with low_cpu_mem_usage) | pass |
| merging, safe merge, unmerging | pass |
| several adapters, set, disable, delete, modules_to_save, training, fp16 and bf16 bases | pass |
| test_adapter_dtype_autocast (16 cases) | fail on purpose: it wants B in 16 bits, which stays fp32 here |
| training of biases | skipped by them: there is no `bias` setting |

Not offered: adapters per row of a batch (`adapter_names=`), `add_weighted_adapter` (merge files with `lori merge`),
dropout, embeddings, convolutions, `target_parameters`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from lori_dist.adapter import source
from lori_dist.adapter.adapter import Adapter, Block, Entries, Spec
from lori_dist.adapter.linear import Delta, features, is_conv1d
from lori_dist.adapter.lori_folder import are_positions
from lori_dist.adapter.projection import GENERATOR, checksum
from lori_dist.errors import AdapterError
from lori_dist.integrations.deepspeed import release_locks

if not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):  # without it, positions would be lost on save
    raise ImportError("lori_dist.integrations.peft_tuner: needs peft 0.21 or newer; pip install 'peft>=0.21'")

release_locks()  # a trainer with DeepSpeed would wait for them, for ever, when it compiles its optimizer

IN_FILES = "LORI: needs `pip install lori_dist[peft]` and `import lori_dist.integrations.peft_tuner`"
"""The type that adapter_config.json names. Where this file was not imported, PEFT raises a KeyError of this text."""


class _Type(str):
    """A type that is not in the closed `PeftType`, and reads as one that is."""

    @property
    def value(self) -> str:
        return str(self)


LORI = _Type("LORI")


@dataclass
class LoriConfig(PeftConfig):
    """What `Spec` is, for PEFT. The update is lori_alpha / r * B A, with A frozen and made from seed and module path.

    B is dense until `sparsify`. Raises AdapterError for values that `Spec` refuses, and for another generator of A.
    """

    r: int = 32
    """Rows of A, columns of B."""
    lori_alpha: float = 64.0
    seed: int = 0
    """Give each task its own: the updates of tasks are then nearly orthogonal."""
    target_modules: list[str] | str | None = "all-linear"
    """As in PEFT: names, a regular expression over paths, or `all-linear`."""
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    """Trained in full, and saved."""
    projection_dtype: str = "float32"
    """Of A."""
    generator: str = GENERATOR
    checksums: dict[str, str] = field(default_factory=dict)
    """Module path -> checksum of A, written on save and compared on load."""
    shapes: dict[str, list[int]] = field(default_factory=dict)
    """Module path -> out_features and in_features, written on save for those who read the folder without the base."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LORI
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # which PEFT's matching expects
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if self.layers_pattern and self.layers_to_transform is None:
            raise AdapterError("layers_pattern: was given without layers_to_transform; give both, or neither")
        if self.generator != GENERATOR:
            raise AdapterError(
                f"generator: the adapter's A comes from {self.generator!r}, this version makes {GENERATOR!r}; "
                "use the version it was trained with"
            )
        self.spec()

    def spec(self) -> Spec:
        dtype = getattr(torch, self.projection_dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise AdapterError(f"projection_dtype: {self.projection_dtype!r} was given; wanted one such as 'float32'")
        return Spec(rank=self.r, alpha=self.lori_alpha, seed=self.seed, dtype=dtype)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "peft_type": IN_FILES}


class LoriLinear(nn.Module, BaseTunerLayer):
    """A linear layer and one `Delta` for each adapter. A is a buffer of it, so nothing that PEFT does can train it."""

    get_base_layer: Callable[[], nn.Linear]  # PEFT's, which is not typed
    set_adapter: Callable[..., None]
    active_adapters: list[str]

    adapter_layer_names = ("lori_delta",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, path: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path = path
        self.out_features, self.in_features = features(base_layer)
        self.lori_delta = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False

    def add(self, name: str, spec: Spec, index: Tensor | None = None) -> None:
        """A new B of zeros, in place of what the adapter had. index: its kept entries, as in `Delta`."""
        trains = name not in self.lori_delta or any(p.requires_grad for p in self.lori_delta[name].parameters())
        delta = Delta(
            module=self.path,
            in_features=self.in_features,
            out_features=self.out_features,
            seed=spec.seed,
            rank=spec.rank,
            scale=spec.scale,
            dtype=spec.dtype,
            index=index,
            device=self.get_base_layer().weight.device,
        )
        self.lori_delta[name] = delta.requires_grad_(trains)

    def delta(self, adapter: str) -> Delta:
        return cast(Delta, self.lori_delta[adapter])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters:
            if name in self.lori_delta:
                y = self.lori_delta[name](x, y)
        return y

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update, in the shape of the base's weight, fp32."""
        delta = self.delta(adapter)
        update = delta.weight(delta.values)
        return update.t() if is_conv1d(self.get_base_layer()) else update

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the updates to the base's weight; with safe_merge, not before their sum is known to be finite."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lori_delta]
        if names:
            self._add(names, 1.0, safe=safe_merge)
            self.merged_adapters += names

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes them out again, to the rounding of the weight's dtype."""
        names = [name for name in self.merged_adapters if name in self.lori_delta]
        if names:
            self._add(names, -1.0, safe=False)
        self.merged_adapters.clear()

    def _add(self, names: Sequence[str], sign: float, *, safe: bool) -> None:
        weight = self.get_base_layer().weight
        if not weight.dtype.is_floating_point:
            raise AdapterError(f"{self.path}: its weight is {weight.dtype}; merging takes floating point weights")
        # Summed before it is rounded to the weight's dtype, once.
        total = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for name in names:
            total = total + sign * self.get_delta_weight(name)
        if safe and not bool(total.isfinite().all()):
            raise AdapterError(f"{self.path}: merging {', '.join(names)} gives NaNs; the adapter seems to be broken")
        weight.data = total.to(weight.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class LoriModel(BaseTuner):
    """What PEFT puts on a model. Made by `get_peft_model` and `PeftModel.from_pretrained`."""

    prefix = "lori_"
    tuner_layer_cls = LoriLinear
    target_module_mapping: Mapping[str, list[str]] = {}

    def _create_and_replace(
        self,
        config: LoriConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        is_new = not isinstance(target, LoriLinear)
        if is_new and not isinstance(target, nn.Linear) and not is_conv1d(target):
            raise AdapterError(
                f"Target module {target} is not supported: {current_key} is a {type(target).__name__}, no linear "
                "layer; name other target_modules"
            )
        layer = LoriLinear(target, current_key) if is_new else cast(LoriLinear, target)
        layer.add(adapter_name, config.spec())
        _check(config, current_key, layer.delta(adapter_name))
        if adapter_name not in self.active_adapters:  # one more is not trained before it is made active
            layer.delta(adapter_name).requires_grad_(False)
        if is_new:
            layer.set_adapter(self.active_adapters)
            self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: LoriConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        held = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        for name, layer in _layers(model, adapter_name).items():
            delta = layer.delta(adapter_name)
            if delta.index is not None:
                held[f"{name}.lori_delta.{adapter_name}.index"] = delta.index
            config.checksums[layer.path] = checksum(delta.a())
            config.shapes[layer.path] = [layer.out_features, layer.in_features]
        return held

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LoriConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state_dict = dict(state_dict)
        for name, layer in _layers(model, adapter_name).items():
            keys = (f"{name}.lori_delta.index", f"base_model.model.{name}.lori_delta.index")
            index = next((state_dict.pop(key) for key in keys if key in state_dict), None)
            _check_index(layer, config, index)
            layer.add(adapter_name, config.spec(), index)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def dense(model: nn.Module | str | Path, adapter_name: str = "default") -> dict[str, Tensor]:
    """Module path -> B, (out_features, rank), a copy: what the functions of `lori_dist.masks` choose from.

    model: that which PEFT has made, or a folder it has saved, which is the way where an engine shards the model.
    Raises AdapterError for a model whose values DeepSpeed has parted.
    """
    if not isinstance(model, nn.Module):
        saved = source.load(Path(model))
        entries, rank = saved.blocks[0].entries, saved.blocks[0].rank
        return {path: entries[path].dense(rows, rank) for path, (rows, _) in saved.shapes.items() if path in entries}
    return {
        layer.path: _entries(layer.delta(adapter_name)).dense(layer.out_features, layer.delta(adapter_name).rank)
        for layer in _layers(model, adapter_name).values()
    }


def sparsify(model: nn.Module, masks: Mapping[str, Tensor], adapter_name: str = "default") -> None:
    """Begins the sparse phase: B is zero again and has only the entries that masks keep; A stays as it is.

    masks: module path -> (out_features, rank) bool, for every module. Make the optimizer after this: the parameters
    are new. Raises AdapterError, before anything is changed, for masks that do not fit or an unknown adapter.
    """
    layers = _layers(model, adapter_name)
    if not layers:
        raise AdapterError(f"{adapter_name}: the model has no LoRI adapter of this name")
    spec = _spec(model, adapter_name)
    by_path = {layer.path: layer for layer in layers.values()}
    if by_path.keys() != masks.keys():
        path = min(by_path.keys() ^ masks.keys())
        raise AdapterError(f"masks: {path} is in only one of masks and adapter; give one mask for each of its modules")
    for path, layer in by_path.items():
        wanted = (layer.out_features, spec.rank)
        if masks[path].dtype != torch.bool or tuple(masks[path].shape) != wanted:
            raise AdapterError(
                f"masks: the mask of {path} is {masks[path].dtype} {tuple(masks[path].shape)}; "
                f"wanted torch.bool {wanted}"
            )
    for path, layer in by_path.items():
        mask = masks[path]
        index = None if bool(mask.all()) else mask.flatten().nonzero().squeeze(1).to(torch.int32)
        layer.add(adapter_name, spec, index)


def to_adapter(model: nn.Module, adapter_name: str = "default", *, base: Mapping[str, Any] | None = None) -> Adapter:
    """One of a PEFT model's adapters as `save_adapter`, `lori merge` and the exports take them.

    base: identity of the base model. Raises AdapterError for an adapter that is not there.
    """
    layers = {layer.path: layer for layer in _layers(model, adapter_name).values()}
    if not layers:
        raise AdapterError(f"{adapter_name}: the model has no LoRI adapter of this name")
    deltas = {path: layer.delta(adapter_name) for path, layer in layers.items()}
    spec = _spec(model, adapter_name)
    block = Block(
        name=adapter_name,
        seed=spec.seed,
        rank=spec.rank,
        alpha=spec.alpha,
        dtype=spec.dtype,
        entries={path: _entries(delta) for path, delta in deltas.items() if delta.kept},
        checksums={path: checksum(delta.a()) for path, delta in deltas.items()},
    )
    shapes = {path: (layer.out_features, layer.in_features) for path, layer in layers.items()}
    return Adapter(shapes=shapes, blocks=(block,), targets=tuple(shapes), base=dict(base or {}))


def _layers(model: nn.Module, adapter_name: str) -> dict[str, LoriLinear]:
    """Name, without what FSDP puts into it, -> the layers that have the adapter, in the model's order."""
    return {
        name.replace("_fsdp_wrapped_module.", ""): module
        for name, module in model.named_modules()
        if isinstance(module, LoriLinear) and adapter_name in module.lori_delta
    }


def _spec(model: nn.Module, adapter_name: str) -> Spec:
    return cast(Mapping[str, LoriConfig], model.peft_config)[adapter_name].spec()


def _entries(delta: Delta) -> Entries:
    if delta.values is not None and delta.values.numel() != delta.kept:
        raise AdapterError(
            f"{delta.recipe.module}: its values are parted by DeepSpeed; save the adapter (trainer.save_model) and "
            "give the folder"
        )
    index = None if delta.index is None else delta.index.cpu()
    values = torch.zeros(0) if delta.values is None else delta.values.detach().to("cpu", copy=True)
    return Entries(index=index, values=values)


def _check(config: LoriConfig, path: str, delta: Delta) -> None:
    a = delta.a()
    if path in config.checksums and not a.is_meta and checksum(a) != config.checksums[path]:
        raise AdapterError(
            f"{path}: A made from seed {config.seed} has checksum {checksum(a)}, the adapter was trained with "
            f"{config.checksums[path]}; adapter_config.json was changed, or is of another model"
        )


def _check_index(layer: LoriLinear, config: LoriConfig, index: Tensor | None) -> None:
    if index is not None and index.numel() and not are_positions(index, layer.out_features * config.r):
        raise AdapterError(f"{layer.path}: the positions of its kept entries are damaged; save the adapter again")


for _name in (LORI, IN_FILES):
    PEFT_TYPE_TO_CONFIG_MAPPING[_name] = LoriConfig
PEFT_TYPE_TO_TUNER_MAPPING[LORI] = LoriModel
PEFT_TYPE_TO_PREFIX_MAPPING[LORI] = LoriModel.prefix
