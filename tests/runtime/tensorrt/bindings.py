"""The names of TensorRT's and CUDA's bindings that a file of ours uses, read from its syntax tree.

What a variable holds is inferred: from the module's import on, through assignments, what methods
return, arguments of calls within the file, and functions' return values.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

# A class of a vendor's module ("" is the module itself), and a name in it.
Name = tuple[str, str]

# Functions of ours that return a module, and the module's place among the facts.
MODULES = {"tensorrt": "", "_cudart": "runtime", "CDLL": "driver"}
# Classes of what methods return, where we go on with it.
RETURNS = {
    ("Builder", "create_network"): "INetworkDefinition",
    ("Builder", "create_builder_config"): "IBuilderConfig",
    ("Builder", "create_optimization_profile"): "IOptimizationProfile",
    ("Builder", "build_serialized_network"): "IHostMemory",
    ("IBuilderConfig", "create_timing_cache"): "ITimingCache",
    ("IBuilderConfig", "get_timing_cache"): "ITimingCache",
    ("ICudaEngine", "create_execution_context"): "IExecutionContext",
    ("ICudaEngine", "create_execution_context_without_device_memory"): "IExecutionContext",
    ("ILayer", "get_input"): "ITensor",
    ("ICudaEngine", "create_runtime_config"): "IRuntimeConfig",
    ("ILayer", "get_output"): "ITensor",
    ("INetworkDefinition", "get_input"): "ITensor",
    ("INetworkDefinition", "get_layer"): "ILayer",
    ("INetworkDefinition", "get_output"): "ITensor",
    ("IRuntimeConfig", "create_runtime_cache"): "IRuntimeCache",
    ("OnnxParser", "get_error"): "ParserError",
    ("Runtime", "deserialize_cuda_engine"): "ICudaEngine",
}
_SCOPES = (ast.FunctionDef, ast.Lambda)


@dataclass
class Bindings:
    """The names in ``code``: those it relies on, and those that it asks for with ``probe``.

    ``classes`` are all that the facts know; ``unplaced`` has names that a vendor has, on objects of
    which nothing could be inferred.
    """

    code: str
    classes: dict[str, set[str]]
    relied: set[Name] = field(default_factory=set)
    asked: set[Name] = field(default_factory=set)
    unplaced: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._tree = ast.parse(self.code)
        self._held: dict[tuple[ast.AST | None, str], str | Name] = {}
        self._scope: dict[ast.AST, ast.AST | None] = {}
        self._functions: dict[str, ast.FunctionDef] = {}
        self._place(self._tree, None)
        before = -1
        while before < len(self._held):
            before = len(self._held)
            for node in ast.walk(self._tree):
                self._learn(node)
        for node in ast.walk(self._tree):
            self._note(node)

    def _place(self, node: ast.AST, scope: ast.AST | None) -> None:
        for child in ast.iter_child_nodes(node):
            self._scope[child] = scope
            if isinstance(child, ast.FunctionDef):
                self._functions[child.name] = child
            self._place(child, child if isinstance(child, _SCOPES) else scope)

    def _learn(self, node: ast.AST) -> None:
        """Remember what a statement gives to a variable, or a call to a parameter."""
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                for target, value in zip(targets, values, strict=True):
                    self._hold(target, self.type_of(value))
            case ast.Assign(targets=[target], value=value):
                self._hold(target, self.type_of(value))
            case (
                ast.For(target=target, iter=values) | ast.comprehension(target=target, iter=values)
            ):
                self._hold(target, self.type_of(values))
            case ast.withitem(context_expr=value, optional_vars=ast.Name() as target):
                self._hold(target, self.type_of(value))
            case ast.Return(value=value) if value is not None:
                if isinstance(function := self._scope[node], ast.FunctionDef):
                    self._put((None, f"{function.name}()"), self.type_of(value))
            case ast.Call():
                self._learn_arguments(node)
            case ast.FunctionDef(name=name, args=ast.arguments(args=arguments), returns=returns):
                self._put((None, f"{name}()"), self._annotated(returns))
                for argument in arguments:
                    self._put((node, argument.arg), self._annotated(argument.annotation))

    def _annotated(self, annotation: ast.AST | None) -> str | None:
        names = [getattr(part, "id", "") for part in ast.walk(annotation or ast.Module())]
        return next((name for name in names if name and name in self.classes), None)

    def _learn_arguments(self, call: ast.Call) -> None:
        function = self._functions.get(_called(call))
        if function is None:
            return
        names = [argument.arg for argument in function.args.args if argument.arg != "self"]
        for name, value in zip(names, call.args, strict=False):
            self._put((function, name), self.type_of(value))

    def _hold(self, target: ast.AST, kind: str | Name | None) -> None:
        if isinstance(target, ast.Name):
            self._put((self._scope[target], target.id), kind)
        elif isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "self":
            self._put((None, f"self.{target.attr}"), kind)

    def _put(self, place: tuple[ast.AST | None, str], kind: str | Name | None) -> None:
        if kind is not None:
            self._held.setdefault(place, kind)

    def type_of(self, node: ast.AST) -> str | Name | None:
        """Return the class of ``node`` or of its items, a method as (class, name), or nothing."""
        match node:
            case ast.Name(id=name):
                return self._variable(node, name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                return self._held.get((None, f"self.{name}"))
            case ast.Attribute(value=base, attr=name):
                return self._member(self.type_of(base), name)
            case ast.Call(func=ast.Name(id="probe"), args=[owner, ast.Constant(value=str(name))]):
                return self._member(self.type_of(owner), name)
            case ast.Call(func=function):
                if (module := MODULES.get(_called(node))) in self.classes:
                    return module
                kind = self.type_of(function)
                if isinstance(kind, tuple):
                    return RETURNS.get(kind)
                if _called(node) == "list":
                    return self.type_of(node.args[0])
                return kind or self._held.get((None, f"{_called(node)}()"))
            case ast.ListComp(elt=each) | ast.Subscript(value=each):
                return self.type_of(each)
            case ast.IfExp(body=one, orelse=other):
                return self.type_of(one) or self.type_of(other)
        return None

    def _variable(self, node: ast.AST, name: str) -> str | Name | None:
        scope = self._scope[node]
        while (scope, name) not in self._held and scope is not None:
            scope = self._scope[scope]
        return self._held.get((scope, name))

    def _member(self, owner: str | Name | None, name: str) -> str | Name | None:
        if not isinstance(owner, str):
            return None
        path = ".".join(filter(None, (owner, name)))
        return path if path in self.classes else (owner, name)

    def _note(self, node: ast.AST) -> None:
        match node:
            case ast.Call(func=ast.Name(id="probe"), args=[owner, ast.Constant(value=str(name))]):
                if isinstance(kind := self.type_of(owner), str):
                    self.asked.add((kind, name))
            case ast.Attribute(value=base, attr=name):
                if isinstance(kind := self.type_of(base), str):
                    self.relied.add((kind, name))
                elif any(name in names for names in self.classes.values()):
                    self.unplaced.add(name)


def names_of_ours(code: str) -> Iterator[str]:
    """Yield the names that ``code`` defines: functions, classes, fields and attributes."""
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                yield name
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                yield name
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                yield name


def _called(call: ast.Call) -> str:
    """Return the name of the function or the method that is called."""
    return str(getattr(call.func, "id", getattr(call.func, "attr", "")))
