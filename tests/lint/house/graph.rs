//! The modules of a crate, the imports between them, and the loops that these imports form.

use std::collections::{BTreeMap, BTreeSet};

use crate::tokens::{Token, after_group};

/// A module's path below the crate's root. The path of the root is empty.
pub(crate) type Module = Vec<String>;

/// The crate's modules with their product code.
pub(crate) type Modules = BTreeMap<Module, Vec<Token>>;

/// The modules that each module imports. A path in a module's code is an import, both in a `use`
/// and elsewhere. The path imports the deepest module that it names. A re-export is also an import.
pub(crate) type Imports = BTreeMap<Module, BTreeSet<Module>>;

pub(crate) fn name(module: &Module) -> String {
    if module.is_empty() {
        return "crate".to_owned();
    }
    module.join("::")
}

pub(crate) fn imports(modules: &Modules) -> Imports {
    let macros = exported_macros(modules);
    modules
        .iter()
        .map(|(module, tokens)| {
            let mut scope = Scope {
                modules,
                macros: &macros,
                file: module,
                inline: Vec::new(),
                names: BTreeMap::new(),
                found: BTreeSet::new(),
            };
            scope.read_uses(tokens);
            scope.read_paths(tokens);
            (module.clone(), scope.found)
        })
        .collect()
}

/// Returns the macros with the attribute `#[macro_export]`, each with its module. This attribute
/// puts a macro into the crate's root.
fn exported_macros(modules: &Modules) -> BTreeMap<String, Module> {
    let mut all = BTreeMap::new();
    for (module, tokens) in modules {
        let mut exported = false;
        for window in tokens.windows(3) {
            let [first, second, third] = window else {
                continue;
            };
            exported |= first.is("macro_export");
            if exported
                && first.is("macro_rules")
                && second.is("!")
                && let Some(name) = third.word()
            {
                all.insert(name.to_owned(), module.clone());
                exported = false;
            }
        }
    }
    all
}

/// The state of the function that reads the imports of one file.
struct Scope<'a> {
    modules: &'a Modules,
    macros: &'a BTreeMap<String, Module>,
    file: &'a Module,
    /// The inline modules around the current token, each with the index of the token after the
    /// module.
    inline: Vec<(String, usize)>,
    /// The modules that the file has imported. The key is the name that the module has in the file.
    names: BTreeMap<String, Module>,
    found: BTreeSet<Module>,
}

impl Scope<'_> {
    fn read_uses(&mut self, tokens: &[Token]) {
        let mut at = 0;
        while at < tokens.len() {
            self.follow_inline(tokens, at);
            if is_use(tokens, at) {
                let mut tree = Tree { tokens, at: at + 1 };
                let mut leaves = Vec::new();
                tree.read(&[], &mut leaves);
                for leaf in leaves {
                    self.import(&leaf);
                }
                at = tree.at;
            } else {
                at += 1;
            }
        }
    }

    fn import(&mut self, leaf: &Leaf) {
        let Some(module) = self.resolve(&leaf.path) else {
            return;
        };
        if module.last() == leaf.path.last() {
            self.names.insert(leaf.name.clone(), module.clone());
        }
        self.add(module);
    }

    /// Reads the paths in code, such as `crate::a::b` or `child::function`.
    fn read_paths(&mut self, tokens: &[Token]) {
        self.inline.clear();
        let mut at = 0;
        while let Some(token) = tokens.get(at) {
            self.follow_inline(tokens, at);
            if is_use(tokens, at) {
                while tokens.get(at).is_some_and(|token| !token.is(";")) {
                    at += 1;
                }
                continue;
            }
            // `pub(in crate::a)` restricts which modules can import an item. It imports nothing.
            if token.is("pub") && tokens.get(at + 2).is_some_and(|token| token.is("in")) {
                at = after_group(tokens, at + 1);
                continue;
            }
            let (path, end) = path_at(tokens, at);
            let before = at.checked_sub(1).and_then(|before| tokens.get(before));
            let continues = before.is_some_and(|token| token.is("::") || token.is("."));
            if path.len() > 1
                && !continues
                && let Some(module) = self.resolve(&path)
            {
                self.add(module);
            }
            at = end.max(at + 1);
        }
    }

    /// Updates `inline`, the list of the inline modules that contain the token with the index `at`.
    fn follow_inline(&mut self, tokens: &[Token], at: usize) {
        self.inline.retain(|(_, end)| at < *end);
        if let (Some(module), Some(name), Some(open)) =
            (tokens.get(at), tokens.get(at + 1), tokens.get(at + 2))
            && module.is("mod")
            && open.is("{")
            && let Some(name) = name.word()
        {
            let end = after_group(tokens, at + 2);
            self.inline.push((name.to_owned(), end));
        }
    }

    fn add(&mut self, module: Module) {
        if module != *self.file {
            self.found.insert(module);
        }
    }

    /// Returns the deepest module that a path names. Returns `None` if the path leads into another
    /// crate.
    fn resolve(&self, path: &[String]) -> Option<Module> {
        let first = path.first()?;
        let mut here = self.file.clone();
        here.extend(self.inline.iter().map(|(name, _)| name.clone()));
        let mut rest = path;
        let mut base = match first.as_str() {
            "crate" => {
                rest = rest.get(1..)?;
                // Each program in src/bin is a separate crate. In such a crate, `crate` means the
                // module of the program's main file, for example `bin::NAME`.
                let of_bin = self.file.first().is_some_and(|first| first == "bin");
                self.file.get(..if of_bin { 2 } else { 0 })?.to_vec()
            }
            "self" => {
                rest = rest.get(1..)?;
                here
            }
            "super" => {
                while rest.first().is_some_and(|word| word == "super") {
                    here.pop()?;
                    rest = rest.get(1..)?;
                }
                here
            }
            name => {
                let child: Module = here.iter().chain([first]).cloned().collect();
                if self.modules.contains_key(&child) {
                    here
                } else {
                    rest = rest.get(1..)?;
                    self.names.get(name)?.clone()
                }
            }
        };
        if base.is_empty()
            && let [name] = rest
            && let Some(module) = self.macros.get(name)
        {
            return Some(module.clone());
        }
        for word in rest {
            base.push(word.clone());
            if !self.modules.contains_key(&base) {
                base.pop();
                break;
            }
        }
        // An inline module (`mod name { … }`) counts as the module of the file that contains it.
        while !self.modules.contains_key(&base) {
            base.pop()?;
        }
        Some(base)
    }
}

/// Returns whether a `use` item begins at the token with the index `at`. In `impl Trait + use<'a>`,
/// `use` is not an item.
fn is_use(tokens: &[Token], at: usize) -> bool {
    let is = |at: usize, text: &str| tokens.get(at).is_some_and(|token| token.is(text));
    is(at, "use") && !is(at + 1, "<")
}

/// Returns the words of a path, and the index of the token after the path. `at` is the index of the
/// path's first token.
fn path_at(tokens: &[Token], at: usize) -> (Vec<String>, usize) {
    let mut path = Vec::new();
    let mut end = at;
    while let Some(word) = tokens.get(end).and_then(Token::word) {
        path.push(word.to_owned());
        end += 1;
        let more = tokens.get(end + 1).and_then(Token::word).is_some();
        if !more || !tokens.get(end).is_some_and(|token| token.is("::")) {
            break;
        }
        end += 1;
    }
    (path, end)
}

/// One name that a `use` imports.
struct Leaf {
    path: Vec<String>,
    name: String,
}

/// A parser for the tree of names in a `use`. The index of the next token is `at`.
struct Tree<'a> {
    tokens: &'a [Token],
    at: usize,
}

impl Tree<'_> {
    fn accept(&mut self, text: &str) -> bool {
        let matches = self.tokens.get(self.at).is_some_and(|token| token.is(text));
        self.at += usize::from(matches);
        matches
    }

    fn word(&mut self) -> Option<String> {
        let word = self.tokens.get(self.at).and_then(Token::word)?.to_owned();
        self.at += 1;
        Some(word)
    }

    /// Reads one branch of the `use`, up to a comma, a closing brace or the semicolon.
    fn read(&mut self, prefix: &[String], leaves: &mut Vec<Leaf>) {
        let mut path = prefix.to_vec();
        // `::name` names another crate, even if a module of this crate has the same name.
        if self.accept("::") {
            path.push(String::new());
        }
        loop {
            if self.accept("{") {
                while !self.accept("}") && self.at < self.tokens.len() {
                    self.read(&path, leaves);
                    self.accept(",");
                }
                return;
            }
            if self.accept("*") {
                break;
            }
            match self.word() {
                Some(word) if word == "self" && !path.is_empty() => {}
                Some(word) => path.push(word),
                None => {
                    // A `use` cannot contain this token. The token is skipped, so that the caller's
                    // loop ends.
                    self.at += 1;
                    return;
                }
            }
            if !self.accept("::") {
                break;
            }
        }
        let last = path.last().cloned().unwrap_or_default();
        let name = if self.accept("as") { self.word() } else { None };
        leaves.push(Leaf {
            path,
            name: name.unwrap_or(last),
        });
    }
}

/// Returns the modules that import each other in a loop, the largest loop first. A loop is a
/// strongly connected component with more than one module. Tarjan's algorithm finds these
/// components.
pub(crate) fn loops(imports: &Imports) -> Vec<Vec<Module>> {
    let mut search = Search {
        imports,
        next: 0,
        seen: BTreeMap::new(),
        stack: Vec::new(),
        loops: Vec::new(),
    };
    for module in imports.keys() {
        if !search.seen.contains_key(module) {
            search.visit(module);
        }
    }
    let mut loops = search.loops;
    loops.sort_by_key(|modules| (usize::MAX - modules.len(), modules.clone()));
    loops
}

struct Search<'a> {
    imports: &'a Imports,
    next: usize,
    /// The visited modules, each with two numbers that Tarjan's algorithm needs. The first number
    /// is the module's own number. The second number is the lowest number of all modules that are
    /// on the stack and that this module can reach.
    seen: BTreeMap<&'a Module, (usize, usize)>,
    stack: Vec<&'a Module>,
    loops: Vec<Vec<Module>>,
}

impl<'a> Search<'a> {
    fn visit(&mut self, module: &'a Module) -> usize {
        let number = self.next;
        self.next += 1;
        self.seen.insert(module, (number, number));
        self.stack.push(module);
        let mut least = number;
        for import in self.imports.get(module).into_iter().flatten() {
            match self.seen.get(import) {
                None => least = least.min(self.visit(import)),
                Some((number, _)) if self.stack.contains(&import) => least = least.min(*number),
                Some(_) => {}
            }
        }
        self.seen.insert(module, (number, least));
        if least == number
            && let Some(at) = self.stack.iter().position(|there| *there == module)
        {
            let mut members: Vec<Module> = self.stack.drain(at..).cloned().collect();
            if members.len() > 1 {
                members.sort();
                self.loops.push(members);
            }
        }
        least
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokens::{product, tokens};

    fn module(name: &str) -> Module {
        name.split("::")
            .filter(|word| !word.is_empty())
            .map(str::to_owned)
            .collect()
    }

    fn imports_of(files: &[(&str, &str)]) -> Imports {
        let modules = files
            .iter()
            .map(|(name, source)| (module(name), product(&tokens(source)).tokens))
            .collect();
        imports(&modules)
    }

    /// Returns `importer -> imported` for each import.
    fn arrows(files: &[(&str, &str)]) -> Vec<String> {
        let mut all = Vec::new();
        for (from, imports) in imports_of(files) {
            for to in imports {
                all.push(format!("{} -> {}", name(&from), name(&to)));
            }
        }
        all
    }

    fn loops_of(files: &[(&str, &str)]) -> Vec<Vec<String>> {
        let loops = loops(&imports_of(files));
        let names = loops
            .iter()
            .map(|modules| modules.iter().map(name).collect());
        names.collect()
    }

    #[test]
    fn a_nested_use_imports_each_module_that_it_names() {
        let source = "use crate::{b::{self, c::{D, E as F}}, g::*, h as i, std::x};";
        assert_eq!(
            arrows(&[("a", source), ("b", ""), ("b::c", ""), ("g", ""), ("h", "")]),
            ["a -> b", "a -> b::c", "a -> g", "a -> h"]
        );
    }

    #[test]
    fn an_import_loop_through_super_is_found() {
        let files = [
            ("a", "mod b; mod c; pub fn x() {}"),
            ("a::b", "fn f() { super::c::g() }"),
            ("a::c", "use super::b::f;"),
        ];
        assert_eq!(loops_of(&files), [["a::b", "a::c"]]);
    }

    #[test]
    fn a_reexport_is_an_import() {
        let files = [
            ("a", "mod b; pub use b::B;"),
            ("a::b", "use super::A;"),
            ("c", "pub(crate) use crate::a::B as C;"),
        ];
        assert_eq!(arrows(&files), ["a -> a::b", "a::b -> a", "c -> a"]);
        assert_eq!(loops_of(&files), [["a", "a::b"]]);
    }

    #[test]
    fn a_path_in_a_string_a_comment_or_a_test_is_not_an_import() {
        let source = "
            //! use crate::b;
            const TEXT: &str = \"use crate::b;\";
            #[cfg(test)]
            mod tests { use crate::b; }
            #[cfg(test)]
            use crate::b::C;
            pub(in crate::b) fn f() {}
        ";
        assert!(arrows(&[("a", source), ("b", "")]).is_empty());
    }

    #[test]
    fn an_imported_name_at_the_beginning_of_a_path_is_replaced_by_its_module() {
        let files = [
            (
                "a",
                "use crate::b as short; fn f() { short::c::g(); d::h(); x.d::<T>(); }",
            ),
            ("a::d", ""),
            ("b", ""),
            ("b::c", ""),
        ];
        assert_eq!(arrows(&files), ["a -> a::d", "a -> b", "a -> b::c"]);
    }

    #[test]
    fn a_path_that_begins_with_a_child_module_is_an_import() {
        let files = [
            ("", "mod a; fn main() { a::run() }"),
            ("a", "use crate::VERSION;"),
        ];
        assert_eq!(loops_of(&files), [["crate", "a"]]);
    }

    #[test]
    fn a_path_into_another_crate_imports_no_module() {
        let files = [
            (
                "a",
                "use ::log::info; use log::warn; fn f() { other::log::g(); }",
            ),
            ("log", ""),
        ];
        assert!(arrows(&files).is_empty());
    }

    #[test]
    fn a_use_of_an_exported_macro_imports_the_module_that_defines_it() {
        let files = [
            ("", "mod a; mod error; fn main() { a::run() }"),
            ("a", "use crate::refuse;"),
            (
                "error",
                "#[macro_export] macro_rules! refuse { () => { $crate::a::x() } }",
            ),
        ];
        assert_eq!(arrows(&files), ["crate -> a", "a -> error", "error -> a"]);
    }

    #[test]
    fn the_imports_of_an_inline_module_are_imports_of_its_file() {
        let files = [
            (
                "a",
                "mod inner { use super::super::b; use super::A; mod deep { use self::x::Y; } }",
            ),
            ("b", ""),
        ];
        assert_eq!(arrows(&files), ["a -> b"]);
    }

    #[test]
    fn the_file_of_a_program_in_src_bin_is_the_root_of_a_separate_crate() {
        let files = [("bin::server", "use crate::x::Y; fn f() {}"), ("x", "")];
        assert!(arrows(&files).is_empty());
    }

    #[test]
    fn the_largest_of_several_loops_is_listed_first() {
        let files = [
            ("a", "use crate::b;"),
            ("b", "use crate::a; use crate::c;"),
            ("c", "use crate::d;"),
            ("d", "use crate::e;"),
            ("e", "use crate::c;"),
            ("f", "use crate::a;"),
        ];
        assert_eq!(loops_of(&files), [vec!["c", "d", "e"], vec!["a", "b"]]);
    }

    #[test]
    fn capturing_a_lifetime_with_use_is_not_an_import() {
        let source = "fn f<'a>() -> impl Iterator + use<'a> { crate::b::g() }";
        assert_eq!(arrows(&[("a", source), ("b", "")]), ["a -> b"]);
    }
}
