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
| training of biases | skipped by them: `bias` is "none" |

Rows of one batch can have different adapters (`model(..., adapter_names=["one", "__base__", "two"])`, `generate` too).

Not offered: `add_weighted_adapter` (merge files with `lori merge`), embeddings, convolutions, `target_parameters`,
training of biases.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from lori_dist import formats
from lori_dist.adapter.adapter import Adapter, Block, Entries, Spec
from lori_dist.adapter.bases import features, is_conv1d
from lori_dist.adapter.linear import Delta
from lori_dist.adapter.projection import GENERATOR, checksum
from lori_dist.errors import AdapterError
from lori_dist.formats import patterns, tuner
from lori_dist.formats.checks import require
from lori_dist.formats.tuner import are_positions
from lori_dist.integrations import model_card
from lori_dist.integrations.deepspeed import release_locks

log = logging.getLogger(__name__)

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

BASE = "__base__"
"""Name in `adapter_names` of a row that uses the base alone."""

ALPHA = 64.0
"""Default of `LoriConfig.lori_alpha`."""


@dataclass
class LoriConfig(PeftConfig):
    """The counterpart of `Spec` for PEFT. The update is lori_alpha / r * B A, with A frozen and made from seed and
    module path.

    B is dense until `sparsify`. Raises AdapterError for values that `Spec` refuses, for another generator of A, and for
    settings of `LoraConfig` that LoRI has no meaning for.
    """

    r: int = 32
    """Rows of A, columns of B."""
    lori_alpha: float | None = None
    """64 where neither this nor lora_alpha is given."""
    seed: int = 0
    """Give each task its own: the updates of tasks are then nearly orthogonal."""
    target_modules: list[str] | str | None = "all-linear"
    """Names, a regular expression over paths, or `all-linear`, as in PEFT; None means `all-linear`."""
    exclude_modules: list[str] | str | None = None
    """Names or a regular expression over paths of modules that are not targets, as in PEFT. They win over
    target_modules."""
    layers_to_transform: list[int] | int | None = None
    """Numbers of the layers that have targets, however these are named; None: all layers."""
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    """Trained in full, and saved."""
    lora_alpha: float | None = None
    """Another name of lori_alpha, as `LoraConfig` has it; None once the configuration is made."""
    lora_dropout: float = 0.0
    """Share of the entries of A's input that are zeroed in training, the others scaled up, as in `LoraConfig`."""
    bias: str = "none"
    """No bias is trained."""
    projection_dtype: str = "float32"
    """Data type of A."""
    generator: str = GENERATOR
    checksums: dict[str, str] = field(default_factory=dict)
    """Module path -> checksum of A, written on save and compared on load."""
    shapes: dict[str, list[int]] = field(default_factory=dict)
    """Module path -> out_features and in_features, written on save for those who read the folder without the base."""
    kept: dict[str, int] = field(default_factory=dict)
    """Path of a module whose B is sparse -> its kept entries, written on save for readers that make the layers before
    they see the tensors, as transformers does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.is_from_file = type(getattr(self, "peft_type", None)) is str  # in a program it is None, or LORI
        """Whether an adapter_config.json has given these values."""
        self.peft_type = LORI
        if self.is_from_file and self.lori_alpha is None:
            raise AdapterError("adapter_config.json: lori_alpha is missing; save the adapter again")
        if self.lora_alpha is not None and self.lori_alpha not in (None, self.lora_alpha):
            raise AdapterError(
                f"lora_alpha: got {self.lora_alpha!r}, and {self.lori_alpha!r} as lori_alpha, which is the same "
                "setting; set only one of them"
            )
        given = self.lori_alpha if self.lora_alpha is None else self.lora_alpha
        self.lori_alpha, self.lora_alpha = ALPHA if given is None else given, None
        if self.bias != "none":
            raise AdapterError(f"bias: got {self.bias!r}, and no bias is trained here; remove it, or set it to 'none'")
        is_share = isinstance(self.lora_dropout, int | float) and not isinstance(self.lora_dropout, bool)
        if not is_share or not 0 <= self.lora_dropout < 1:
            raise AdapterError(f"lora_dropout: got {self.lora_dropout!r}; wanted a number of at least 0 and below 1")
        if self.target_modules is None:
            self.target_modules = "all-linear"
        if self.is_from_file:
            tuner.check_settings(vars(self), is_saved=False)
            _check_names(self)
            self.checksums, self.shapes, self.kept = self.checksums or {}, self.shapes or {}, self.kept or {}
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # which PEFT's matching expects
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if self.layers_pattern and self.layers_to_transform is None:
            raise AdapterError("layers_pattern: is set without layers_to_transform; give both, or neither")
        if self.generator != GENERATOR:
            raise AdapterError(
                f"generator: the adapter's A comes from {self.generator!r}, this version makes {GENERATOR!r}; "
                "use the version it was trained with"
            )
        self.spec()

    def spec(self) -> Spec:
        dtype = getattr(torch, self.projection_dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise AdapterError(f"projection_dtype: got {self.projection_dtype!r}; wanted one such as 'float32'")
        return Spec(rank=self.r, alpha=cast(float, self.lori_alpha), seed=self.seed, dtype=dtype)

    def to_dict(self) -> dict[str, Any]:
        settings = {**super().to_dict(), "peft_type": IN_FILES}
        del settings["lora_alpha"]  # one name in files, which earlier versions read too
        return settings

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """adapter_config.json; and, with an adapter beside it, the model card that PEFT leaves without a content."""
        super().save_pretrained(save_directory, **kwargs)
        _fill_card(Path(save_directory), self.base_model_name_or_path)


class LoriLinear(nn.Module, BaseTunerLayer):
    """A linear layer and one `Delta` for each adapter. A is a buffer of it, so nothing that PEFT does can train it."""

    get_base_layer: Callable[[], nn.Linear]  # PEFT's, which is not typed
    set_adapter: Callable[..., None]
    active_adapters: list[str]

    adapter_layer_names = ("lori_delta",)
    other_param_names = ("lori_dropout",)

    def __init__(self, base_layer: nn.Module, path: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path = path
        self.out_features, self.in_features = features(base_layer)
        self.lori_delta = nn.ModuleDict()
        self.lori_dropout = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True  # what peft.helpers.disable_input_dtype_casting switches
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

    def expect(self, name: str, spec: Spec, kept: int) -> None:
        """Adds an adapter with so many kept entries, whose positions are read from a file later, as parameters are."""
        self.add(name, spec, torch.full((kept,), -1, dtype=torch.int32))
        delta = self.delta(name)
        delta.register_buffer("index", delta.index, persistent=True)
        hook = delta.register_forward_pre_hook(functools.partial(_refuse_unread, self.path))
        cast(Any, delta).looks_once = hook

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """adapter_names: of each row of x, or `BASE`; None: all rows meet the active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and self.merged:
            raise AdapterError(f"adapter_names: {self.path} has merged adapters; call unmerge_adapter() first")
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        if adapter_names is not None:
            return self._mixed(x, y, adapter_names)
        for name in self.active_adapters:
            if name in self.lori_delta:
                y = self._updated(name, x, y)
        return y

    def _updated(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        delta, x = self.lori_delta[name], self.lori_dropout[name](x)
        if x.dtype == y.dtype or self.cast_input_dtype_enabled:
            return cast(Tensor, delta(x, y))
        # peft.helpers.disable_input_dtype_casting: the update is computed in the input's own dtype.
        return y + delta(x, torch.zeros_like(y, dtype=x.dtype)).to(y.dtype)

    def _mixed(self, x: Tensor, y: Tensor, adapter_names: Sequence[str]) -> Tensor:
        if len(x) != len(adapter_names):
            raise AdapterError(
                f"adapter_names: {self.path} has an input of shape {tuple(x.shape)} for {len(adapter_names)} rows, so "
                "they cannot be distinguished; give one name for each row, or leave the module out of target_modules"
            )
        for name in dict.fromkeys(adapter_names):
            if name in self.lori_delta:
                of_name = [row for row, other in enumerate(adapter_names) if other == name]
                rows = torch.tensor(of_name, device=y.device)
                y = y.index_copy(0, rows, self._updated(name, x[rows], y[rows]))
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
    """The wrapper that PEFT puts on a model. `get_peft_model` and `PeftModel.from_pretrained` make it."""

    prefix = "lori_"
    tuner_layer_cls = LoriLinear
    target_module_mapping: Mapping[str, list[str]] = {}

    def __init__(self, model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        self._is_injected = isinstance(peft_config, PeftConfig)  # a PeftModel gives it by the adapter's name
        super().__init__(model, peft_config, *args, **kwargs)

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
        dropout = config.lora_dropout
        layer.lori_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        will_be_read = self._will_be_read(config)
        if will_be_read and current_key in config.kept:
            layer.expect(adapter_name, config.spec(), config.kept[current_key])
        else:
            layer.add(adapter_name, config.spec())
        _check(config, layer, adapter_name, is_wanted=will_be_read)
        if adapter_name not in self.active_adapters:  # one more is not trained before it is made active
            layer.delta(adapter_name).requires_grad_(False)
        if is_new:
            layer.set_adapter(self.active_adapters)
            self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = cast(Mapping[str, LoriConfig], self.peft_config)[adapter_name]
        if config.is_from_file:
            _refuse_endless(config, [name for name, _ in model.named_modules()])
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if self._will_be_read(config):
            _refuse_left_out(model, config, adapter_name)

    def _will_be_read(self, config: LoriConfig) -> bool:
        """Whether the positions of a file are loaded as parameters are: by transformers' `load_adapter`, to train on or
        not, which puts an adapter into a model without a PeftModel around it."""
        return config.is_from_file and (config.inference_mode or self._is_injected)

    @staticmethod
    def _check_target_module_exists(config: LoriConfig, key: str) -> Any:
        """Decides as PEFT does whether a module is a target, except that layers_to_transform counts for every kind of
        target_modules."""
        found = check_target_module_exists(config, key)
        layers = config.layers_to_transform
        if not found or layers is None or layers == []:
            return found
        by_name = SimpleNamespace(
            target_modules={key.rpartition(".")[2]}, layers_to_transform=layers, layers_pattern=config.layers_pattern
        )
        return found if check_target_module_exists(by_name, key) else False

    def _check_merge_allowed(self) -> None:
        _refuse_tied(self.model)
        super()._check_merge_allowed()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Inside, a layer's rows meet the adapters that the argument `adapter_names` has for them."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        _refuse_names(self, names)
        # `generate` repeats rows for all but an encoder: for beams, or for several answers to one prompt.
        given = {**vars(kwargs.get("generation_config") or SimpleNamespace()), **kwargs}
        repeats = max(given.get("num_beams") or 1, given.get("num_return_sequences") or 1)
        of_rows = [name for name in names for _ in range(repeats)]
        has_encoder = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        encoder = self.model.get_encoder() if has_encoder else None
        in_encoder = set() if encoder is None else set(encoder.modules())
        hooks = [
            module.register_forward_pre_hook(
                functools.partial(_with_names, list(names) if module in in_encoder else of_rows), with_kwargs=True
            )
            for module in self.modules()
            if isinstance(module, LoriLinear | AuxiliaryTrainingWrapper)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

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
            config.kept.pop(layer.path, None)
            if delta.index is not None:
                held[f"{name}.lori_delta.{adapter_name}.index"] = delta.index
                config.kept[layer.path] = delta.kept
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
            _check(config, layer, adapter_name, is_wanted=config.is_from_file)
            _check_values(layer, adapter_name, name, state_dict)
        if config.is_from_file:
            _refuse_left_out(model, config, adapter_name)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def dense(model: nn.Module | str | Path, adapter_name: str = "default") -> dict[str, Tensor]:
    """Module path -> B, (out_features, rank), a copy: what the functions of `lori_dist.masks` choose from.

    model: that which PEFT has made, or a folder it has saved, which is the way where an engine shards the model.
    Raises AdapterError for a model whose values DeepSpeed has parted.
    """
    if not isinstance(model, nn.Module):
        saved = formats.load(Path(model))
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
            f"{delta.recipe.module}: its values are partitioned by DeepSpeed; save the adapter "
            "(trainer.save_model) and "
            "give the folder"
        )
    index = None if delta.index is None else delta.index.cpu()
    values = torch.zeros(0) if delta.values is None else delta.values.detach().to("cpu", copy=True)
    return Entries(index=index, values=values)


def _check(config: LoriConfig, layer: LoriLinear, adapter_name: str, *, is_wanted: bool) -> None:
    """Raises AdapterError where A is another than the adapter was trained with; is_wanted: or where nothing tells."""
    path, a = layer.path, layer.delta(adapter_name).a()
    wanted = config.checksums.get(path)
    if wanted is None and is_wanted:
        raise AdapterError(
            f"{path}: adapter_config.json has no checksum of its A; it was changed, or is of another model. Save the "
            "adapter again"
        )
    if wanted is not None and not a.is_meta and checksum(a) != wanted:
        raise AdapterError(
            f"{path}: A made from seed {config.seed} has checksum {checksum(a)}, the adapter was trained with "
            f"{wanted}; adapter_config.json was changed, or is of another model"
        )


NAMES = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save")


def _check_names(config: LoriConfig) -> None:
    """Raises AdapterError for a wrong type in a file, where PEFT expects names or numbers of layers."""
    for name in NAMES:
        found = getattr(config, name)
        fits = found is None or isinstance(found, str) or _are(found, str)
        require(fits, f"adapter_config.json: {name}", found, "a text or an array of texts")
    layers = config.layers_to_transform
    require(layers is None or _are([layers], int) or _are(layers, int), "layers_to_transform", layers, "integers")


def _are(found: Any, kind: type) -> bool:
    return isinstance(found, list | set) and all(type(item) is kind for item in found)


def _refuse_endless(config: LoriConfig, paths: list[str]) -> None:
    """Raises AdapterError for a pattern in a file that could take for ever to match the model's paths."""
    for name in NAMES:
        found = getattr(config, name)
        if isinstance(found, str) and found != "all-linear":
            patterns.check(f"adapter_config.json: {name}", [found], paths)
        elif found and name in ("layers_pattern", "modules_to_save"):
            patterns.check(f"adapter_config.json: {name}", list(found), paths)


def _refuse_left_out(model: nn.Module, config: LoriConfig, adapter_name: str) -> None:
    """Raises AdapterError for a module of a saved adapter that is not adapted here: PEFT would drop its tensors."""
    adapted = {layer.path for layer in _layers(model, adapter_name).values()}
    if left_out := sorted(config.checksums.keys() - adapted):
        raise AdapterError(
            f"{left_out[0]}: the adapter was trained on this module, which is not adapted here; adapter_config.json "
            "was changed, or is of another model"
        )


def _refuse_tied(model: nn.Module) -> None:
    """Raises AdapterError where merging would change a weight that other modules use too."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    for layer in model.modules():
        if not isinstance(layer, LoriLinear):
            continue
        tied = owners[cast(nn.Parameter, layer.get_base_layer().weight)]
        if len(tied) > 1:
            raise AdapterError(
                f"{layer.path}: its weight is tied ({', '.join(name.replace('.base_layer', '') for name in tied)}); "
                "merging would change all of them, so untie it first or keep the adapter unmerged"
            )


def _refuse_names(model: nn.Module, names: Any) -> None:
    """Raises AdapterError for an `adapter_names` that cannot be met."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise AdapterError(f"adapter_names: got {names!r}; wanted a list with the name of an adapter for each row")
    if model.training:
        raise AdapterError("adapter_names: the model is in training mode; call eval() first, or train one adapter")
    known = {name for layer in model.modules() if isinstance(layer, LoriLinear) for name in layer.lori_delta}
    if unknown := sorted({*names} - known - {BASE}):
        raise AdapterError(f"adapter_names: unknown adapter {unknown[0]!r}; there are {', '.join(sorted(known))}")


def _with_names(names: list[str], module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": names}


def _refuse_unread(path: str, delta: Delta, _: Any) -> None:
    """Raises AdapterError where a reader has loaded values, but not their positions. Looks once."""
    size = delta.out_features * delta.rank
    if delta.index is not None and delta.index.numel() and not are_positions(delta.index, size):
        raise AdapterError(
            f"{path}: the positions of its kept entries were not loaded; load the folder with PeftModel.from_pretrained"
        )
    cast(Any, delta).looks_once.remove()


def _check_values(layer: LoriLinear, adapter_name: str, name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Raises AdapterError where a file has not as many values as a module keeps entries: to PEFT, none are zeros."""
    keys = (f"{name}.lori_delta.values", f"base_model.model.{name}.lori_delta.values")
    found = next((state_dict[key].numel() for key in keys if key in state_dict), 0)
    kept = layer.delta(adapter_name).kept
    if found != kept:
        raise AdapterError(f"{layer.path}: the file has {found} values for {kept} kept entries; save the adapter again")


def _fill_card(folder: Path, base_model_name: str | None) -> None:
    """Fills in the model card. The head of PEFT's README.md stays; the rest becomes a card of the adapter if it is an
    unfilled form. An error here does not stop a save."""
    card = folder / "README.md"
    try:
        found = card.read_text(encoding="utf-8") if card.is_file() else ""
        if found and "[More Information Needed]" not in found:
            return
        made = model_card.text(formats.open_lazy(folder), base_model_name or "unknown", model_card.UNKNOWN)
        _, head, body = made.split("---\n", 2)
        if found.startswith("---\n"):
            head = found.split("---\n", 2)[1]
        card.write_text(f"---\n{head}---\n{body}{USAGE}", encoding="utf-8")
    except (AdapterError, OSError, ValueError) as error:
        log.info("%s: no model card was written: %s", folder, error)


USAGE = """
## Load it

```python
import lori_dist.integrations.peft_tuner  # makes LoRI known to PEFT: pip install lori_dist[peft]
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "THIS FOLDER")
```

A is not stored: it is made from the seed in adapter_config.json and compared with its checksums.
"""


def _check_index(layer: LoriLinear, config: LoriConfig, index: Tensor | None) -> None:
    if index is not None and index.numel() and not are_positions(index, layer.out_features * config.r):
        raise AdapterError(f"{layer.path}: the positions of its kept entries are damaged; save the adapter again")


for _name in (LORI, IN_FILES):
    PEFT_TYPE_TO_CONFIG_MAPPING[_name] = LoriConfig
PEFT_TYPE_TO_TUNER_MAPPING[LORI] = LoriModel
PEFT_TYPE_TO_PREFIX_MAPPING[LORI] = LoriModel.prefix
