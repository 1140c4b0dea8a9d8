//! Whether the house is in order: how many modules import each other in a loop, how long functions
//! are, and whether a type's name is unique in its crate. Prints the figures of each crate, and fails
//! with a sentence for each thing that is out of order.
//!
//! ```text
//! rrun-house [--figures] [CHECKOUT]     --figures: only prints them
//! ```
//!
//! Product code is everything of these crates outside directories `tests`, files `tests.rs` and items
//! under `#[cfg(test)]`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use graph::{Imports, Module, Modules};
use items::Function;
use tokens::Token;

mod graph;
mod items;
mod tokens;

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Folders of the checkout below which every crate is product, and how many modules of one of these
/// crates may import each other in a loop.
const PRODUCT: &[(&str, usize)] = &[
    ("runtime", 4),
    ("kernel", 4),
    ("cri-shim", 10),
    ("proto", 4),
];

/// A function may have more lines than this only if `#[expect(clippy::too_many_lines, reason = …)]` or
/// `#[allow(…)]` of it stands before it.
const LONG: usize = 60;
/// No function may have more lines than this.
const TOO_LONG: usize = 100;

/// Names of types that a crate may define several times, since they are the field's own terms.
const FIELD_TERMS: &[&str] = &[];

fn main() -> ExitCode {
    let mut only_figures = false;
    let mut checkout = PathBuf::from(".");
    for argument in std::env::args_os().skip(1) {
        if argument == "--figures" {
            only_figures = true;
        } else {
            checkout = argument.into();
        }
    }
    match measure(&checkout) {
        Ok(complaints) if only_figures || complaints.is_empty() => ExitCode::SUCCESS,
        Ok(complaints) => {
            println!();
            for complaint in complaints {
                println!("{complaint}");
            }
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("rrun-house: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Prints the figures of all crates. Returns what is out of order.
fn measure(checkout: &Path) -> Result<Vec<String>> {
    let mut complaints = Vec::new();
    println!(
        "{:24} {:>7} {:>12} {:>9} {:>5} {:>5} {:>7}",
        "crate",
        "modules",
        "largest loop",
        "functions",
        format!(">{LONG}"),
        format!(">{TOO_LONG}"),
        "lines"
    );
    let mut measured = 0;
    for (folder, limit) in PRODUCT {
        for dir in crates_below(&checkout.join(folder))? {
            let name = dir.strip_prefix(checkout).unwrap_or(&dir);
            let krate = Crate::read(&name.display().to_string(), &dir)?;
            krate.print();
            complaints.extend(krate.complaints(*limit));
            measured += 1;
        }
    }
    if measured == 0 {
        return Err(format!("{}: no crate is there", checkout.display()).into());
    }
    Ok(complaints)
}

/// The directories of crates, this one and those below it.
fn crates_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    if dir.join("Cargo.toml").is_file() {
        all.push(dir.to_owned());
    }
    for entry in entries(dir)? {
        if entry.is_dir() && !entry.ends_with("target") {
            all.extend(crates_below(&entry)?);
        }
    }
    Ok(all)
}

/// What is in a directory, in the order of names; nothing if it is not there.
fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let mut all = Vec::new();
    for entry in fs::read_dir(dir)? {
        all.push(entry?.path());
    }
    all.sort();
    Ok(all)
}

/// Product source files below a directory of a crate, without those of crates within it.
fn sources(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for entry in entries(dir)? {
        let name = entry.file_name().unwrap_or_default();
        if entry.is_dir() {
            let other = name == "tests" || name == "target" || entry.join("Cargo.toml").is_file();
            if !other {
                all.extend(sources(&entry)?);
            }
        } else if name != "tests.rs" && entry.extension().is_some_and(|kind| kind == "rs") {
            all.push(entry);
        }
    }
    Ok(all)
}

/// One file's product code.
struct File {
    /// By its path in the crate.
    path: PathBuf,
    /// None if it is not below src/.
    module: Option<Module>,
    tokens: Vec<Token>,
    lines: usize,
}

/// A crate's files, without modules that only tests compile.
fn product_files(dir: &Path) -> Result<Vec<File>> {
    let mut files = Vec::new();
    let mut of_tests: Vec<Module> = Vec::new();
    for path in sources(dir)? {
        let text = fs::read_to_string(&path)?;
        let product = tokens::product(&tokens::tokens(&text));
        let path = path.strip_prefix(dir)?.to_owned();
        let module = module_of(&path);
        for name in product.test_modules {
            let parent = module.iter().flatten().cloned();
            of_tests.push(parent.chain([name]).collect());
        }
        files.push(File {
            path,
            module,
            tokens: product.tokens,
            lines: text.lines().count().saturating_sub(product.test_lines),
        });
    }
    files.retain(|file| {
        let module = file.module.as_deref().unwrap_or_default();
        !of_tests.iter().any(|test| module.starts_with(test))
    });
    Ok(files)
}

struct Crate {
    name: String,
    imports: Imports,
    /// The largest first.
    loops: Vec<Vec<Module>>,
    /// By the file that each is in.
    functions: Vec<(PathBuf, Function)>,
    /// By name, where each is defined.
    types: BTreeMap<String, Vec<String>>,
    lines: usize,
}

impl Crate {
    fn read(name: &str, dir: &Path) -> Result<Crate> {
        let mut krate = Crate {
            name: name.to_owned(),
            imports: Imports::new(),
            loops: Vec::new(),
            functions: Vec::new(),
            types: BTreeMap::new(),
            lines: 0,
        };
        let mut modules = Modules::new();
        for file in product_files(dir)? {
            krate.lines += file.lines;
            let functions = items::functions(&file.tokens).into_iter();
            let functions = functions.map(|function| (file.path.clone(), function));
            krate.functions.extend(functions);
            if let Some(module) = file.module {
                krate.add_types(&file.path, &file.tokens);
                // lib.rs and main.rs are one root.
                modules.entry(module).or_default().extend(file.tokens);
            }
        }
        krate.imports = graph::imports(&modules);
        krate.loops = graph::loops(&krate.imports);
        Ok(krate)
    }

    /// Definitions of one name in one module exclude each other, by `cfg`: they count once.
    fn add_types(&mut self, file: &Path, tokens: &[Token]) {
        let mut of_module = BTreeSet::new();
        for one in items::types(tokens) {
            if one.local || of_module.insert(one.name.clone()) {
                let place = format!("{}:{}", file.display(), one.line);
                self.types.entry(one.name).or_default().push(place);
            }
        }
    }

    fn longer_than(&self, lines: usize) -> usize {
        let functions = self.functions.iter();
        functions.filter(|(_, one)| one.lines > lines).count()
    }

    fn print(&self) {
        println!(
            "{:24} {:>7} {:>12} {:>9} {:>5} {:>5} {:>7}",
            self.name,
            self.imports.len(),
            self.loops.first().map_or(0, Vec::len),
            self.functions.len(),
            self.longer_than(LONG),
            self.longer_than(TOO_LONG),
            self.lines
        );
    }

    /// What is out of order, a sentence each.
    fn complaints(&self, limit: usize) -> Vec<String> {
        let loops = self.loops.iter();
        let loops = loops.filter(|modules| modules.len() > limit);
        let mut all: Vec<String> = loops.map(|modules| self.of_loop(modules, limit)).collect();
        let functions = self.functions.iter();
        all.extend(functions.filter_map(|(file, function)| self.of_function(file, function)));
        for (name, places) in &self.types {
            if places.len() > 1 && !FIELD_TERMS.contains(&name.as_str()) {
                all.push(format!(
                    "{}: the type {name} is defined {} times: {}",
                    self.name,
                    places.len(),
                    places.join(", ")
                ));
            }
        }
        all
    }

    /// The sentence is followed by what each module of the loop imports from the others.
    fn of_loop(&self, modules: &[Module], limit: usize) -> String {
        let mut text = format!(
            "{}: {} modules import each other in a loop, and at most {limit} may:",
            self.name,
            modules.len()
        );
        for module in modules {
            let imports = self.imports.get(module).into_iter().flatten();
            let imports = imports.filter(|import| modules.contains(import));
            let imports: Vec<String> = imports.map(graph::name).collect();
            text += &format!("\n    {} -> {}", graph::name(module), imports.join(", "));
        }
        text
    }

    fn of_function(&self, file: &Path, function: &Function) -> Option<String> {
        let what = format!(
            "{}/{}:{}: the function {} has {} lines",
            self.name,
            file.display(),
            function.line,
            function.name,
            function.lines
        );
        if function.lines > TOO_LONG {
            return Some(format!("{what}, more than {TOO_LONG}"));
        }
        (function.lines > LONG && !function.may_be_long).then(|| {
            format!("{what}, more than {LONG}, without an attribute for clippy::too_many_lines")
        })
    }
}

/// The module of a file, by its path in the crate; none if it is not below src/.
fn module_of(path: &Path) -> Option<Module> {
    let path = path.strip_prefix("src").ok()?.with_extension("");
    let mut module: Module = path
        .iter()
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    if module.last().is_some_and(|last| last == "mod") {
        module.pop();
    }
    if let [root] = module.as_slice()
        && matches!(root.as_str(), "lib" | "main")
    {
        module.clear();
    }
    Some(module)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_files_path_is_its_modules() {
        for (path, module) in [
            ("src/lib.rs", Some("")),
            ("src/main.rs", Some("")),
            ("src/a.rs", Some("a")),
            ("src/a/mod.rs", Some("a")),
            ("src/a/main.rs", Some("a::main")),
            ("src/bin/server.rs", Some("bin::server")),
            ("build.rs", None),
        ] {
            let found = module_of(Path::new(path)).map(|module| module.join("::"));
            assert_eq!(found.as_deref(), module, "{path}");
        }
    }
}
